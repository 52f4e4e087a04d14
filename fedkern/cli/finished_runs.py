"""Commands on finished runs, each with the run's folder: attack, evaluate, predict, export and extend."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedkern import plugins
from fedkern.cli.command_parser import add_code, add_common, add_data, command_parser, read
from fedkern.cli.flags import Parser, check_filled, first, key_values
from fedkern.cli.front_page import PROGRAM
from fedkern.cli.request import Request, trusted
from fedkern.downstream.export import FORMATS
from fedkern.engine.store.records import plain
from fedkern.errors import UserError, nearest
from fedkern.files import expand
from fedkern.settings.config import RunConfig
from fedkern.settings.given_paths import absolute
from fedkern.standard_streams import put

FILLED = ("out", "data", "data_root", "cache", "model", "workers", "rounds")
NAMES = ("attack", "evaluate", "predict", "export", "extend")
SHOWN = 5
"""Predictions that are printed."""


def _parser(command: str) -> Parser:
    parser = command_parser(command)
    parser.add_argument("folder", nargs="?", metavar="DIR", help="folder of a finished run")
    if command == "predict":
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
        parser.add_argument("--cache", metavar="DIR", help="folder that keeps the decoded images")
        parser.add_argument("--workers", metavar="N", help="processes in which clients work side by side")
        parser.add_argument("--quiet", action="store_true", help="no display; only the run folder at the end")
    else:
        parser.add_argument("--format", default="torch-export", metavar="|".join(FORMATS),
                            help="form of the file; default torch-export")  # fmt: skip
        parser.add_argument("--out", metavar="FILE", help="file to write; default model.onnx, model.pt2 or model.pt in "
                                                          "the run folder")  # fmt: skip
    parser.add_argument("--model", metavar="NAME", help="the run's network again, where it names code that may run")
    add_code(parser, data=command == "evaluate")
    add_common(parser, "what was written")
    return parser


def parse(words: Sequence[str]) -> Request | None:
    """Reads one of these commands; None if the words are another command."""
    command = first(words)
    if command not in NAMES:
        return None
    parser = _parser(command)
    found = read(parser, command, words)
    if found.help:
        return Request("help", help=parser.format_help())
    check_filled({name: value for name, value in vars(found).items() if name in FILLED})
    if not found.folder:
        raise UserError(f"{PROGRAM} {command} needs the folder of a finished run.")
    code = {} if found.model is None else {"model": found.model}
    common: dict[str, Any] = {
        "command": command,
        "folder": Path(found.folder),
        "json": found.json,
        "options": tuple(found.method_option),
        "plugins": tuple(found.plugin),
    }
    if command == "attack":
        return Request(settings={**absolute({"data_root": found.data_root}), **code}, **common)
    if command == "evaluate":
        where = absolute({"data_root": found.data_root, "cache": found.cache})
        options = absolute(key_values(found.data_option, "data_option"))
        return Request(settings={"data": found.data, **where, **code}, data_options=options, **common)
    if command == "extend":
        if found.rounds is None:
            raise UserError(f"{PROGRAM} extend needs --rounds R, the communication rounds in all.")
        knobs = {knob.field: knob for knob in RunConfig.knobs()}
        given = {name: getattr(found, name) for name in ("data_root", "cache", "workers", "model")}
        return Request(
            settings={name: knobs[name].convert(value) for name, value in given.items() if value is not None},
            quiet=found.quiet,
            arguments={"rounds": knobs["rounds"].convert(found.rounds)},
            **common,
        )
    out = Path(found.out) if found.out else None
    if command == "export":
        if found.format not in FORMATS:
            raise UserError(
                f'--format must be one of {", ".join(FORMATS)}, not "{found.format}".{nearest(found.format, FORMATS)}'
            )
        return Request(out=out, settings=code, arguments={"format": found.format}, **common)
    if not found.paths:
        raise UserError(f"{PROGRAM} predict needs images behind the run folder: files, or folders of files.")
    return Request(out=out, settings=code, arguments={"paths": [expand(path) for path in found.paths]}, **common)


def attack(request: Request) -> int:
    """Runs the membership attack on a finished run's model, prints the result and keeps it in the run folder."""
    from fedkern.downstream import membership_attack

    folder, root = _folder(request), request.settings["data_root"]
    found = membership_attack.attack(folder, data_root=root, keep=False, trusted=_code(request))
    if request.json:
        put(plain(found))
    else:
        from fedkern.report.progress import terminal
        from fedkern.report.tables import attack_table

        terminal().print(attack_table(found, str(folder)))
    # Last, so that the printed result is not lost if the folder cannot be written.
    membership_attack.write(folder, found)
    return 0


def evaluate(request: Request) -> int:
    """Evaluates a finished run's network, prints its figures and writes them into the run folder."""
    from fedkern import atomic
    from fedkern.allocator import keep_freed_memory
    from fedkern.cli.backend_check import check_backend
    from fedkern.downstream.evaluation import evaluate_run
    from fedkern.engine.store.records import plain
    from fedkern.report.display import display
    from fedkern.report.progress import terminal
    from fedkern.report.tables import figures_table

    check_backend()
    keep_freed_memory()
    folder, data = _folder(request), request.settings["data"]
    where = {name: request.settings[name] for name in ("data", "data_root", "cache")}
    told = display(quiet=False, json=request.json).on_notice
    code, options = _code(request), request.data_options
    metrics, sets = evaluate_run(folder, data_options=options, trusted=code, progress=told, **where)
    config = RunConfig.load(folder, device="cpu")
    result = {"method": config.method, "data": data or config.data, "metrics": plain(metrics)}
    text = json.dumps(result, indent=2, allow_nan=False)
    if request.json:
        put(text)
    else:
        terminal().print(figures_table(f"{result['method']} on {result['data']}", metrics, sets))
    # Last, so that the printed result is not lost if the folder cannot be written.
    atomic.write_bytes(folder / ("-".join(["evaluate", *([data] if data else [])]) + ".json"), (text + "\n").encode())
    return 0


def extended(request: Request) -> Request:
    """Gives the run more rounds; the request to go on with it."""
    from fedkern.engine.store.extending import extend
    from fedkern.methods import METHODS
    from fedkern.report.names import say
    from fedkern.report.progress import terminal

    folder = _folder(request)
    plugins.check_given(request.plugins, RunConfig.load(folder, device="cpu").plugins, folder)
    before = {path.name for path in folder.iterdir()}
    config = extend(folder, request.arguments["rounds"])
    for name in sorted({path.name for path in folder.iterdir()} - before):
        if not (request.quiet or request.json):
            say(terminal(), f"results of the former network: {folder / name}")
    spans = METHODS[config.method].spans
    if spans and not (request.quiet or request.json):
        say(terminal(), f"{spans}: the network will not be that of a run of {config.rounds} rounds from the start")
    return Request(
        "resume", resume=folder, settings=request.settings, options=request.options, plugins=request.plugins,
        quiet=request.quiet, json=request.json,
    )  # fmt: skip


def predict(request: Request) -> int:
    """Predicts the classes of images and writes a table, or for segmentation masks; prints a few rows."""
    from fedkern.downstream import prediction
    from fedkern.report.progress import advancing

    predictor = prediction.Predictor.open(_folder(request), _code(request))
    segments = predictor.task == "segmentation"
    out = request.out or Path("masks" if segments else "predictions.csv")
    _check_free(out, "predict")
    paths = prediction.found_images(request.arguments["paths"])
    first: list[tuple[Path, Any]] = []
    with advancing(len(paths), "predicting", "images", json=request.json) as step:

        def rows() -> Iterator[tuple[Path, Any, Any]]:
            for row in predictor.files(paths):
                if len(first) < SHOWN and not segments:
                    first.append(row[:2])
                yield row
                step()

        if segments:
            prediction.write_masks(out, paths, rows())
        else:
            several = predictor.task == "multilabel"
            prediction.write_table(out, predictor.classes, (row[:2] for row in rows()), several=several)
    if request.json:
        put({"images": len(paths), "classes": list(predictor.classes), "out": str(out)})
        return 0
    for path, probabilities in first:
        print(f"{path}  {predictor.said(probabilities)}")
    if first and len(paths) > SHOWN:
        print("...")
    count = f"{len(paths)} image{'s' if len(paths) > 1 else ''}"
    print(f"{count}: {out}")
    return 0


def export(request: Request) -> int:
    """Writes the network in another form, and prints the files."""
    from fedkern.downstream import export as exporting
    from fedkern.downstream.prediction import Predictor

    kind = request.arguments["format"]
    folder = _folder(request)
    predictor = Predictor.open(folder, _code(request))
    out = request.out or folder / f"model{exporting.FORMATS[kind]}"
    _check_free(out, "export")
    written = exporting.export(predictor, out, kind)
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


def _check_free(out: Path, command: str) -> None:
    """Raises UserError where ``out`` exists or lies in no folder, before the network is asked."""
    if out.exists():
        raise UserError(f"{out} is there already: name another one with --out, or remove it.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.parent} is no folder that {command} could write to: make it, or name another --out.")


COMMAND_TABLE = {"attack": attack, "evaluate": evaluate, "predict": predict, "export": export}
