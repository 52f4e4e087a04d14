"""Helpers of commands on a finished run: its folder, network and code, and the output of results."""

import json
from collections.abc import Mapping
from pathlib import Path

from fedkern.cli.parser import Parser, add_arguments
from fedkern.cli.request import Request, find_trusted_code
from fedkern.process.standard_streams import print_result


def add_data(parser: Parser, options: str = "an option of that other data set") -> None:
    """Add the flags of another data set than the run's own. ``options`` is the help of ``--data-option``."""
    add_arguments(parser, {
        "data": ("NAME", "another data set than the run's own"),
        "data_root": ("DIR", "folder of the data files"),
        "cache": ("DIR", "folder that keeps decoded images; by default the run's, for the run's own data"),
        "data_option": ("key=value", f"{options}; repeatable", []),
    })  # fmt: skip


def add_network(parser: Parser, printed: str = "what was written", *, choice: bool = True) -> None:
    """Add the flags about the run's network and code, and ``--json``, which prints ``printed``.

    ``choice`` is whether the best round's network is available.
    """
    if choice:
        text = "network of the last round, or of the best round of a run with --patience; default last"
        parser.add_argument("--network", choices=("last", "best"), default="last", metavar="last|best", help=text)
    add_arguments(parser, {
        "model": ("NAME", "the run's network again, if it names code that may run"),
        "method_option": ("key=value", "an option of the run again, if it names code that may run; repeatable", []),
        "plugin": ("FILE.py|MODULE", "code that registers the run's method, network or data; repeatable", []),
        "json": ("", f"print {printed} as JSON"),
    })  # fmt: skip


def run_folder(request: Request) -> Path:
    assert request.folder is not None
    return request.folder


def trusted_code(request: Request) -> tuple[str, ...]:
    return find_trusted_code(run_folder(request), request.options, request.settings)


def publish_result(request: Request, result: Mapping[str, object], table: object, path: Path) -> int:
    """Print a command's result, as JSON or as its table, and write it to ``path``. Returns 0."""
    from fedkern.files import atomic
    from fedkern.report.live.progress_bar import make_console

    text = json.dumps(result, indent=2, allow_nan=False)
    if request.json:
        print_result(text)
    else:
        make_console().print(table)
    # Last, so that the printed result is not lost if the folder cannot be written.
    atomic.write_bytes(path, (text + "\n").encode())
    return 0
