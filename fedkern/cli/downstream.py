"""Commands of the downstream tasks on a finished image-text run: ``python -m fedkern.run retrieval DIR`` etc."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedkern.cli.command_parser import add_code, add_common, add_data, command_parser, read
from fedkern.cli.flags import Parser, check_filled, first, key_values, whole_number
from fedkern.cli.front_page import PROGRAM, TASKS
from fedkern.cli.request import Request, absolute, trusted
from fedkern.downstream.tasks import FEATURES
from fedkern.errors import UserError
from fedkern.standard_streams import put

FLAGS: dict[str, dict[str, tuple[str, str, str]]] = {
    # command: flag: (default, metavar, help)
    "retrieval": {"ks": ("1,5,10", "K,...", "recall at these k")},
    "zero-shot": {
        "prompts": ("", "TEXT|FILE", "template such as 'a photo of a {class}.', or a file of templates, instead of the "
                                     "data set's own"),
    },
    "probe": {
        "shots": ("1,5,10,all", "N,...", "training images of every class"),
        "features": (FEATURES[0], "|".join(FEATURES), "what the probe sees: the aligned first token, the mean patch "
                                                      "token or the shared embedding"),
        "draws": ("3", "N", "random choices of the shots, averaged"),
        "seed": ("0", "S", "of these choices"),
    },
    "decode": {
        "epochs": ("10", "E", "passes of the decoder over the training images"),
        "samples": ("0", "N", "training images used, 0 for all"),
        "seed": ("0", "S", "of the decoder's initial weights and its order"),
    },
}  # fmt: skip


def _parser(command: str) -> Parser:
    parser = command_parser(command, f"{TASKS[command]}; the figures are also written into the run folder.")
    parser.add_argument("folder", nargs="?", metavar="DIR", help="folder of a finished run")
    for name, (default, metavar, text) in FLAGS[command].items():
        shown = f"{text}; default {default}" if default else text
        parser.add_argument(f"--{name}", default=default, metavar=metavar, help=shown)
    add_data(parser, "an option of that other data set, or labels=... of the run's")
    add_code(parser, data=True)
    add_common(parser, "the figures")
    return parser


def parse(words: Sequence[str]) -> Request | None:
    """Reads a downstream command; None if the words are another command."""
    command = first(words)
    if command not in TASKS:
        return None
    parser = _parser(command)
    found = read(parser, command, words)
    values = vars(found)
    check_filled({"data": found.data, "data_root": found.data_root, "cache": found.cache})
    if values.pop("help"):
        return Request("help", help=parser.format_help())
    if not values["folder"]:
        raise UserError(f"{PROGRAM} {command} needs the folder of a finished run.")
    where = absolute({"data_root": values.pop("data_root"), "cache": values.pop("cache")})
    options = absolute(key_values(values.pop("data_option"), "data_option"))
    return Request(
        command,
        folder=Path(values.pop("folder")),
        json=values.pop("json"),
        settings={"data": values.pop("data"), **where},
        data_options=options,
        options=tuple(values.pop("method_option")),
        plugins=tuple(values.pop("plugin")),
        arguments={name: _read(name, value) for name, value in values.items()},
    )


def _read(name: str, value: str) -> Any:
    if name == "prompts":
        return value
    if name == "features":
        if value not in FEATURES:
            raise UserError(f"--features must be one of {', '.join(FEATURES)}, not {value}.")
        return value
    lowest = 0 if name in ("samples", "seed") else 1
    if name in ("ks", "shots"):
        words = [word.strip() for word in value.split(",")]
        return tuple(0 if name == "shots" and word == "all" else _number(name, word, 1) for word in words)
    return _number(name, value, lowest)


def _number(name: str, word: str, lowest: int) -> int:
    number = whole_number(word)
    if number < lowest:
        raise UserError(f"--{name} takes whole numbers of at least {lowest}, not {word!r}.")
    return number


def result_name(request: Request) -> str:
    """File name of a result: ``COMMAND[-DATA][-LABELS].json``, with the data set and labels if they were given."""
    data, labels = request.settings.get("data"), request.data_options.get("labels")
    return "-".join(str(word) for word in (request.command, data, labels) if word) + ".json"


def run(request: Request) -> int:
    """Runs a downstream task, prints its figures and writes them into the run folder (:func:`result_name`)."""
    from fedkern import atomic
    from fedkern.allocator import keep_freed_memory
    from fedkern.cli.backend_check import check_backend
    from fedkern.downstream import Finished, decode, probe, retrieve, zero_shot
    from fedkern.report.display import display

    check_backend()
    keep_freed_memory()
    assert request.folder is not None
    code = trusted(request.folder, request.options)
    told = display(quiet=False, json=request.json).on_notice
    finished = Finished.open(
        request.folder, data_options=request.data_options, trusted=code, progress=told, **request.settings
    )
    task: Any = {"retrieval": retrieve, "zero-shot": zero_shot, "probe": probe, "decode": decode}[request.command]
    result = {
        "command": request.command,
        "run": str(request.folder),
        "method": finished.config.method,
        "data": finished.data.name,
        "data_options": dict(request.data_options),
        "networks": len(finished.networks),
        "settings": dict(request.arguments),
        "rows": task(finished, **request.arguments),
    }
    text = json.dumps(result, indent=2, allow_nan=False)
    if request.json:
        put(text)
    else:
        from fedkern.report.progress import terminal
        from fedkern.report.tables import downstream_table

        terminal().print(downstream_table(result))
    # Last, so that the printed result is not lost if the folder cannot be written.
    atomic.write_bytes(request.folder / result_name(request), (text + "\n").encode())
    return 0
