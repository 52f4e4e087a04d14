"""Command ``tune``: measures FusedBlocks' lowerings on this machine and writes the user's own table of them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedkern.cli.command_parser import add_common, command_parser, read
from fedkern.cli.flags import COMMANDS, check_filled, first, whole_number
from fedkern.cli.request import Request
from fedkern.errors import UserError
from fedkern.files import absolute

MOST_THREADS = 1024


def parse(words: Sequence[str]) -> Request | None:
    """Reads the command; None if the words are another command.

    Raises:
        UserError: an unknown flag, or an invalid value.
    """
    if first(words) != "tune":
        return None
    parser = command_parser("tune", f"{COMMANDS['tune']}.")
    parser.add_argument("--quick", action="store_true", help="a coarse table, in seconds instead of minutes")
    parser.add_argument(
        "--threads", metavar="N,...", help="numbers of CPU threads to measure; default 1 and PyTorch's own choice"
    )
    parser.add_argument("--out", metavar="FILE", help="where to write; default a file in the user's cache folder")
    parser.add_argument("--quiet", action="store_true", help="no display; only the file at the end")
    add_common(parser, "what was written")
    found = read(parser, "tune", words)
    check_filled({"out": found.out, "threads": found.threads})
    if found.help:
        return Request("help", help=parser.format_help())
    return Request(
        "tune",
        out=Path(absolute(found.out)) if found.out else None,
        quiet=found.quiet,
        json=found.json,
        arguments={"quick": found.quick, "threads": _threads(found.threads)},
    )


def _threads(text: str | None) -> tuple[int, ...]:
    counts = [whole_number(word) for word in text.split(",")] if text else []
    if not all(1 <= count <= MOST_THREADS for count in counts):
        raise UserError(f"--threads takes whole numbers from 1 to {MOST_THREADS} with commas between, not {text!r}.")
    return tuple(dict.fromkeys(counts))


def tune(request: Request) -> int:
    """Measures, then writes the table; until then nothing changes on the disk, even after Ctrl-C."""
    import torch

    from fedkern import interrupts
    from fedkern.ops._fuse.blocks import choice as fuse_choice
    from fedkern.ops._fuse.blocks import tune as fuse_tune
    from fedkern.ops._fuse.blocks.lowering_costs import Row, write_table
    from fedkern.report.names import say
    from fedkern.report.progress import counting, terminal

    path = request.out or fuse_choice.own_file()
    if path is None:
        raise UserError("There is no home folder to keep the table in: name a file with --out.")
    _check_writable(path)
    counts = request.arguments["threads"] or tuple(dict.fromkeys((1, torch.get_num_threads())))
    asked = fuse_tune.settings(quick=request.arguments["quick"])
    repeats = fuse_tune.QUICK_REPEATS if request.arguments["quick"] else fuse_tune.REPEATS
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    rows: dict[int, list[Row]] = {}
    with counting(len(counts) * len(asked), quiet=request.quiet, json=request.json) as advance:
        for threads in counts:
            found = rows[threads] = []
            for row in fuse_tune.measure(asked, threads, repeats):
                interrupts.check()
                found.append(row)
                advance(f"{row.kind}, {row.branches} x {row.width} at {row.size}, threads {threads}")
    table = fuse_tune.table(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(table, path)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from None
    fuse_choice.forget()
    if request.json:
        print(json.dumps({"file": str(path), "table": table.digest, "measured_on": table.where, "threads": counts,
                          "rows": len(asked) * len(counts)}, indent=2))  # fmt: skip
        return 0
    if request.quiet:
        print(path)
        return 0
    console = terminal()
    say(console, f"{path}: {len(asked) * len(counts)} rows, table {table.digest}, measured on {table.where}")
    if request.out is not None and request.out != fuse_choice.own_file():
        say(console, f"it serves where {fuse_choice.VARIABLE} names it")
    if busy > 0.5 * cores:
        say(console, f"the machine was busy (load {busy:.1f} on {cores} cores): measure again when it is idle")
    return 0


def _check_writable(path: Path) -> None:
    """Raises UserError if the file cannot be written, before minutes of measurement."""
    if path.is_dir():
        raise _unwritable(path, "it is a folder")
    folder = next(each for each in path.parents if each.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(path, f"{folder}: {error.strerror or error}") from None


def _unwritable(path: Path, reason: str) -> UserError:
    return UserError(f"{path} cannot be written ({reason}): name another file with --out.")
