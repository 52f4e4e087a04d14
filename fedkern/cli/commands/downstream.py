"""The downstream tasks on a finished image-text run: ``retrieval DIR``, ``zero-shot DIR`` and so on."""

from __future__ import annotations

from typing import Any

from fedkern.cli.finished_runs import add_data, add_network, code, folder, publish
from fedkern.cli.flags import Parser, add
from fedkern.cli.front_page import TASKS
from fedkern.cli.request import Request
from fedkern.downstream.tasks import FEATURES
from fedkern.errors import UserError
from fedkern.usercode import named_code

FLAGS: dict[str, dict[str, tuple[str, str, str]]] = {
    "retrieval": {"ks": ("K,...", "recall at these k; default 1,5,10", "1,5,10")},
    "zero-shot": {
        "prompts": ("TEXT|FILE", "template such as 'a photo of a {class}.', or a file of templates, instead of the "
                                 "data set's own", ""),
    },
    "probe": {
        "shots": ("N,...", "training images of every class; default 1,5,10,all", "1,5,10,all"),
        "features": ("|".join(FEATURES), "what the probe sees: the aligned first token, the mean patch token or the "
                                         f"shared embedding; default {FEATURES[0]}", FEATURES[0]),
        "draws": ("N", "random choices of the shots, averaged; default 3", "3"),
        "seed": ("S", "of these choices; default 0", "0"),
    },
    "decode": {
        "epochs": ("E", "passes of the decoder over the training images; default 10", "10"),
        "samples": ("N", "training images used, 0 for all; default 0", "0"),
        "seed": ("S", "of the decoder's initial weights and its order; default 0", "0"),
    },
}  # fmt: skip
"""Flags of every task."""


def add_flags(parser: Parser) -> None:
    """Adds the flags of the task that the parser is for."""
    parser.description = f"{TASKS[parser.command]}; the run folder keeps the figures too."
    parser.add_folder("a finished run")
    add(parser, FLAGS[parser.command])
    add_data(parser, "an option of that other data set, or labels=... of the run's")
    add_network(parser, "the figures", choice=False, model=False, data=True)


def checked(request: Request, parser: Parser) -> Request:
    """The request; raises UserError where a value is none of its flag's."""
    request.arguments.update({name: _argument(name, value) for name, value in request.arguments.items()})
    return request


def _argument(name: str, value: str) -> Any:
    """The value of one of `FLAGS`; raises UserError for one that the flag does not take."""
    if name == "features" and value not in FEATURES:
        raise UserError(f"--features must be one of {', '.join(FEATURES)}, not {value}.")
    if name in ("prompts", "features"):
        return value
    lowest = 0 if name in ("samples", "seed") else 1
    if name in ("ks", "shots"):
        words = [word.strip() for word in value.split(",")]
        return tuple(0 if name == "shots" and word == "all" else _number(name, word, 1) for word in words)
    return _number(name, value, lowest)


def _number(name: str, word: str, lowest: int) -> int:
    number = int(word) if word.strip().isdecimal() and len(word.strip()) <= 18 else -1
    if number < lowest:
        raise UserError(f"--{name} takes whole numbers of at least {lowest}, not {word!r}.")
    return number


def result_name(request: Request) -> str:
    """File name of a result: ``COMMAND[-DATA][-LABELS].json``, with the data set and labels if they were given."""
    data, labels = named_code.short(request.settings.get("data") or ""), request.data_options.get("labels")
    return "-".join(str(word) for word in (request.command, data, labels) if word) + ".json"


def play(request: Request) -> int:
    """Does the task, prints its figures and writes them into the run folder (:func:`result_name`)."""
    from fedkern.cli.backend_check import check_backend
    from fedkern.downstream import Finished, decode, probe, retrieve, zero_shot
    from fedkern.process.allocator import keep_freed_memory
    from fedkern.report.live.display import display
    from fedkern.report.tables import downstream_table

    check_backend()
    keep_freed_memory()
    out, notify = folder(request), display(quiet=False, json=request.json).on_notice
    finished = Finished.open(
        out, data_options=request.data_options, trusted=code(request), progress=notify, **request.settings
    )
    task: Any = {"retrieval": retrieve, "zero-shot": zero_shot, "probe": probe, "decode": decode}[request.command]
    result = {
        "command": request.command, "run": str(out), "method": finished.config.method, "data": finished.data.name,
        "data_options": dict(request.data_options), "networks": len(finished.networks),
        "settings": dict(request.arguments), "rows": task(finished, **request.arguments),
    }  # fmt: skip
    return publish(request, result, downstream_table(result), out / result_name(request))
