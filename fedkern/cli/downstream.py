"""Commands of the downstream tasks on a finished image-text run: ``python -m fedkern.run retrieval DIR`` etc."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkern.cli.flags import whole_number
from fedkern.cli.request import Request, trusted
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


def argument(name: str, value: str) -> Any:
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
    number = whole_number(word)
    if number < lowest:
        raise UserError(f"--{name} takes whole numbers of at least {lowest}, not {word!r}.")
    return number


def result_name(request: Request) -> str:
    """File name of a result: ``COMMAND[-DATA][-LABELS].json``, with the data set and labels if they were given."""
    data, labels = request.settings.get("data"), request.data_options.get("labels")
    return "-".join(str(word) for word in (request.command, data, labels) if word) + ".json"


def publish(request: Request, result: Mapping[str, Any], table: object, path: Path) -> int:
    """Prints a command's result, as JSON or as its table, and writes it to ``path``; returns 0."""
    from fedkern import atomic
    from fedkern.report.progress import terminal

    text = json.dumps(result, indent=2, allow_nan=False)
    if request.json:
        put(text)
    else:
        terminal().print(table)
    # Last, so that the printed result is not lost if the folder cannot be written.
    atomic.write_bytes(path, (text + "\n").encode())
    return 0


def run(request: Request) -> int:
    """Runs a downstream task, prints its figures and writes them into the run folder (:func:`result_name`)."""
    from fedkern.allocator import keep_freed_memory
    from fedkern.cli.backend_check import check_backend
    from fedkern.downstream import Finished, decode, probe, retrieve, zero_shot
    from fedkern.report.display import display
    from fedkern.report.tables import downstream_table

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
    return publish(request, result, downstream_table(result), request.folder / result_name(request))
