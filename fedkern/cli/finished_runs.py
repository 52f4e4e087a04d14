"""Commands on finished runs, each with the run's folder: attack, evaluate, predict, export and extend.

The parser also reads the downstream tasks of `fedkern.cli.downstream`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedkern import plugins
from fedkern.cli.command_parser import add_code, add_common, add_data, command_parser, read
from fedkern.cli.downstream import FLAGS, argument, publish
from fedkern.cli.flags import TRACKERS, Parser, add_run_flags, check_filled, first, key_values
from fedkern.cli.front_page import PROGRAM, TASKS
from fedkern.cli.request import Request, trusted
from fedkern.downstream.export import FORMATS, check_kind
from fedkern.engine.store.records import plain
from fedkern.errors import UserError
from fedkern.files import check_new, expand
from fedkern.settings.config import RunConfig
from fedkern.settings.stored import load_settings
from fedkern.standard_streams import put

FILLED = ("out", "data", "data_root", "cache", "model", "workers", "rounds", "wandb")
NAMES = ("attack", "evaluate", "predict", "export", "extend")


def _parser(command: str) -> Parser:
    task = command in TASKS
    parser = command_parser(command, f"{TASKS[command]}; the run folder keeps the figures too." if task else "")
    parser.add_argument("folder", nargs="?", metavar="DIR", help="folder of a finished run")
    if task:
        for name, (default, metavar, text) in FLAGS[command].items():
            shown = f"{text}; default {default}" if default else text
            parser.add_argument(f"--{name}", default=default, metavar=metavar, help=shown)
        add_data(parser, "an option of that other data set, or labels=... of the run's")
    elif command == "predict":
        parser.add_argument("paths", nargs="*", metavar="IMAGE", help="image files, or folders of image files")
        parser.add_argument("--out", metavar="FILE", help="CSV file to write; for segmentation a new folder of masks. "
                                                          "Default predictions.csv, masks")  # fmt: skip
    elif command == "attack":
        parser.add_argument("--data-root", metavar="DIR",
                            help="where the data files are, if not where the run found them")  # fmt: skip
    elif command == "evaluate":
        add_data(parser, "an option of that other data set")
    elif command == "extend":
        parser.add_argument("--rounds", metavar="R", help="communication rounds in all, those done included")
        parser.add_argument("--data-root", metavar="DIR", help="where the data files are, if they have moved")
        parser.add_argument("--data", metavar="FILE.py:NAME", help="the run's data again, where they name code")
        parser.add_argument("--cache", metavar="DIR", help="folder that keeps the decoded images")
        parser.add_argument("--workers", metavar="N", help="processes in which clients work side by side")
        add_run_flags(parser, (*TRACKERS, "quiet"))
    else:
        parser.add_argument("--format", default="torch-export", metavar="|".join(FORMATS),
                            help="form of the file; default torch-export")  # fmt: skip
        parser.add_argument("--out", metavar="FILE", help="file to write; default model.onnx, model.pt2 or model.pt in "
                                                          "the run folder")  # fmt: skip
    if not task and command != "extend":
        parser.add_argument("--network", choices=("last", "best"), default="last", metavar="last|best",
                            help="the network of the last round, or of the best one of a run with --patience; default "
                                 "last")  # fmt: skip
    if not task:
        parser.add_argument("--model", metavar="NAME", help="the run's network again, where it names code that may run")
    add_code(parser, data=task or command == "evaluate")
    add_common(parser, "the figures" if task else "what was written")
    return parser


def parse(words: Sequence[str]) -> Request | None:
    """Reads one of these commands or a downstream task; None if the words are another command."""
    command = first(words)
    task = command in TASKS
    if not task and command not in NAMES:
        return None
    parser = _parser(command)
    found = read(parser, command, words)
    if found.help:
        return Request("help", help=parser.format_help())
    check_filled({name: value for name, value in vars(found).items() if name in FILLED})
    if not found.folder:
        raise UserError(f"{PROGRAM} {command} needs the folder of a finished run.")
    code = {"model": found.model} if getattr(found, "model", None) is not None else {}
    arguments: dict[str, Any] = {"best": getattr(found, "network", "last") == "best"}
    common: dict[str, Any] = {
        "command": command,
        "folder": Path(found.folder),
        "json": found.json,
        "options": tuple(found.method_option),
        "plugins": tuple(found.plugin),
        "arguments": arguments,
    }
    if command == "attack":
        return Request(settings={**RunConfig.read({"data_root": found.data_root}), **code}, **common)
    if command == "evaluate" or task:
        if task:
            common["arguments"] = {name: argument(name, getattr(found, name)) for name in FLAGS[command]}
        where = RunConfig.read({"data_root": found.data_root, "cache": found.cache})
        options = key_values(found.data_option, "data_option")
        return Request(settings={"data": found.data, **where, **code}, data_options=options, **common)
    if command == "extend":
        if found.rounds is None:
            raise UserError(f"{PROGRAM} extend needs --rounds R, the communication rounds in all.")
        given = {name: getattr(found, name) for name in ("rounds", "data", "data_root", "cache", "workers", "model")}
        settings = RunConfig.read({name: value for name, value in given.items() if value is not None})
        arguments["rounds"] = settings.pop("rounds")
        return Request(
            settings=settings,
            **{name: getattr(found, name) for name in (*TRACKERS, "quiet")},
            **common,
        )
    out = Path(found.out) if found.out else None
    if command == "export":
        check_kind(found.format)
        arguments["format"] = found.format
        return Request(out=out, settings=code, **common)
    if not found.paths:
        raise UserError(f"{PROGRAM} predict needs images behind the run folder: files, or folders of files.")
    arguments["paths"] = [expand(path) for path in found.paths]
    return Request(out=out, settings=code, **common)


def attack(request: Request) -> int:
    """Runs the membership attack on a finished run's model, prints the result and keeps it in the run folder."""
    from fedkern.downstream import membership_attack

    folder, root = _folder(request), request.settings["data_root"]
    best, code = request.arguments["best"], _code(request)
    found = membership_attack.attack(folder, data_root=root, keep=False, trusted=code, best=best)
    if request.json:
        put(plain(found))
    else:
        from fedkern.report.progress import terminal
        from fedkern.report.tables import attack_table

        terminal().print(attack_table(found, f"{folder}, network of the {found['network']} round"))
    # Last, so that the printed result is not lost if the folder cannot be written.
    membership_attack.write(folder, found)
    return 0


def evaluate(request: Request) -> int:
    """Evaluates a finished run's network, prints its figures and writes them into the run folder."""
    from fedkern.allocator import keep_freed_memory
    from fedkern.cli.backend_check import check_backend
    from fedkern.downstream.evaluation import evaluate_run
    from fedkern.report.display import display
    from fedkern.report.tables import figures_table

    check_backend()
    keep_freed_memory()
    folder, data, best = _folder(request), request.settings["data"], request.arguments["best"]
    where = {name: request.settings[name] for name in ("data", "data_root", "cache")}
    told = display(quiet=False, json=request.json).on_notice
    code, options, network = _code(request), request.data_options, "best" if best else "last"
    metrics, sets = evaluate_run(folder, data_options=options, trusted=code, best=best, progress=told, **where)
    config = load_settings(folder, device="cpu")
    result = {"method": config.method, "data": data or config.data, "network": network, "metrics": plain(metrics)}
    title = f"{result['method']} on {result['data']}, network of the {network} round"
    name = "-".join(["evaluate", *(["best"] if best else []), *([data] if data else [])])
    return publish(request, result, figures_table(title, metrics, sets, config.main), folder / f"{name}.json")


def extended(request: Request) -> Request:
    """Gives the run more rounds; the request to go on with it."""
    from fedkern.data.registry import check_readable
    from fedkern.engine.own_model import check_given
    from fedkern.engine.store.extending import extend
    from fedkern.methods import METHODS
    from fedkern.report.names import say
    from fedkern.report.progress import terminal

    folder = _folder(request)
    stored = load_settings(folder, device="cpu")
    plugins.check_given(request.plugins, stored.plugins, folder)
    check_given(stored, None, folder)  # before anything is moved
    check_readable(stored.data)
    before = {path.name for path in folder.iterdir()}
    config = extend(folder, request.arguments["rounds"])
    made = sorted({path.name for path in folder.iterdir()} - before)
    told = [f"results of the former network: {folder / name}" for name in made]
    if spans := METHODS[config.method].spans:
        told.append(f"{spans}: the network will not be that of a run of {config.rounds} rounds from the start")
    for text in () if request.quiet or request.json else told:
        say(terminal(), text)
    return dataclasses.replace(request, command="resume", resume=folder, folder=None, arguments={})


def predict(request: Request) -> int:
    """Predicts the classes of images and writes a table, or for segmentation masks; prints a few rows."""
    from fedkern.downstream import prediction
    from fedkern.report.progress import advancing

    predictor = prediction.Predictor.open(_folder(request), _code(request), best=request.arguments["best"])
    name, shown, write = prediction.WRITERS[predictor.task.network]
    out = request.out or Path(name)
    check_new(out, "predict")
    paths = prediction.found_images(request.arguments["paths"])
    first: list[tuple[Path, Any]] = []
    with advancing(len(paths), "predicting", "images", json=request.json) as step:

        def rows() -> Iterator[tuple[Path, Any, Any]]:
            for row in predictor.files(paths):
                if len(first) < shown:
                    first.append(row[:2])
                yield row
                step()

        write(out, predictor, paths, rows())
    if request.json:
        put({"images": len(paths), "classes": list(predictor.classes), "out": str(out)})
        return 0
    for path, probabilities in first:
        print(f"{path}  {predictor.task.said(probabilities, predictor.classes)}")
    if len(paths) > shown > 0:
        print("...")
    count = f"{len(paths)} image{'s' if len(paths) > 1 else ''}"
    print(f"{count}: {out}")
    return 0


def export(request: Request) -> int:
    """Writes the network in another form, and prints the files."""
    from fedkern.downstream import export as exporting

    kind, best = request.arguments["format"], request.arguments["best"]
    folder = _folder(request)
    found = exporting.exportable(folder, _code(request), best=best)
    out = request.out or folder / f"{'best' if best else 'model'}{exporting.FORMATS[kind]}"
    check_new(out, "export")
    written = exporting.export(found, out, kind)
    if request.json:
        put({"files": [str(path) for path in written]})
    else:
        print("\n".join(str(path) for path in written))
    return 0


def _folder(request: Request) -> Path:
    assert request.folder is not None
    return request.folder


def _code(request: Request) -> tuple[str, ...]:
    return trusted(_folder(request), request.options, request.settings)


COMMAND_TABLE = {"attack": attack, "evaluate": evaluate, "predict": predict, "export": export}
