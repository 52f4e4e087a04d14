"""``reproduce NAME|FILE.toml``: a paper's published table beside the figures of runs on this machine."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedkern.cli import extensions, flags
from fedkern.cli.commands.compare import config_of, print_outcome
from fedkern.cli.front_page import PROGRAM
from fedkern.cli.parser import TRACKERS, Parser, add_arguments, key_values
from fedkern.cli.request import Request
from fedkern.errors import UserError
from fedkern.process import interrupts
from fedkern.process.standard_streams import print_result

if TYPE_CHECKING:
    from fedkern.comparison.reproduction import Command, Reproduction

DATA_ROOT = "FEDKERN_DATA_ROOT"
"""Environment variable with the default of ``--data-root``."""
_UNITS = {"h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0}
_OTHERWISE = {
    "seed": "the key seeds gives the seeds",
    "data_root": "--data-root of this command names the data's folder",
    "out": "--out of this command names the folder of all runs",
    **dict.fromkeys(
        ("resume", "flower", *TRACKERS, "profile", "predictions", "report", "quiet", "json", "config"),
        "it is for a single run",
    ),
}
"""Flags of a run that a cell's command does not take, with the alternative."""

USAGE = f"""\
{PROGRAM} reproduce NAME|FILE.toml [flags]    run a paper's table and compare it with the published figures
{PROGRAM} reproduce --example > FILE.toml     print a file to start from

NAME is a paper that fedkern ships, FILE.toml one of your own (docs/reproducing.md). The same command with the same
--out goes on where it stopped, and plays nothing twice; two such commands may run side by side.
"""


def add_flags(parser: Parser) -> None:
    parser.begin(USAGE)
    parser.add_argument("paper", nargs="?", metavar="NAME|FILE.toml", help="a paper that fedkern ships, or your own")
    add_arguments(parser, {
        "table": ("T", "only the cells of one table"),
        "cells": ("NAME,NAME", "only the cells of these names, which may be patterns such as 'CNN*'"),
        "budget": ("2h", "time limit, such as 2h, 90m or 30s: only cells whose estimates fit are run, the longest "
                         "last, and a run stops between two rounds when the time is up; 0 runs nothing"),
        "data_root": ("DIR", f"folder of the data files; default {DATA_ROOT} of the environment"),
        "cache": ("DIR", "folder that keeps decoded images"),
        "workers": ("N", "processes that train the clients of a run in parallel"),
        "out": ("DIR", "folder of the runs and of the table; default reproductions/<name>"),
        "example": ("", "print a file to start from, and run nothing"),
        "quiet": ("", "print nothing but the folder at the end"),
        "json": ("", "print only the table, as JSON"),
    })  # fmt: skip


def check_request(request: Request, parser: Parser) -> Request:
    from fedkern.comparison import published

    arguments = request.arguments
    if not (arguments["paper"] or arguments["example"]):
        names = ", ".join(published.list_papers())
        raise UserError(
            f"{parser.prog} needs a paper: {names}, or your own FILE.toml. --example prints one to start from."
        )
    budget = arguments["budget"]
    settings = dict(request.settings)
    if "data_root" not in settings and os.environ.get(DATA_ROOT):
        settings["data_root"] = os.environ[DATA_ROOT]
    changes = {"budget": None if budget is None else read_budget(budget)}
    return dataclasses.replace(request, settings=settings, arguments={**arguments, **changes})


def read_budget(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(h|min|m|s)?\s*", text)
    if match is None or (match[2] is None and float(match[1])):
        raise UserError(f'--budget must be a time such as 2h, 90m or 30s, not "{text}".')
    return float(match[1]) * _UNITS[match[2] or "s"]


def play(request: Request) -> int:
    """Run what the budget allows. Returns 0, 1 if a run failed, 130 after Ctrl-C and 143 after SIGTERM."""
    from fedkern.cli.backend_check import check_backend
    from fedkern.comparison import published
    from fedkern.comparison.boards import choose_board
    from fedkern.comparison.reproduction import REPRODUCTIONS, Reproduction
    from fedkern.report.live.progress_bar import make_console
    from fedkern.report.names import print_line

    arguments = request.arguments
    if arguments["example"]:
        print_result(published.EXAMPLE.read_text("utf-8").rstrip())
        return 0
    paper = published.load_paper(arguments["paper"])
    out = request.out or REPRODUCTIONS / paper.name
    check_backend()
    reproduction = Reproduction(
        paper, out, lambda words: command_of(request, words),
        lambda: choose_board(quiet=request.quiet, json=request.json), arguments["budget"],
    )  # fmt: skip
    if not (request.quiet or request.json):
        reproduction.tell = lambda text: print_line(make_console(stderr=True), text)
    names = [name.strip() for name in (arguments["cells"] or "").split(",") if name.strip()]
    cells, lines = reproduction.plan(reproduction.select(names, arguments["table"]))
    for line in lines:
        reproduction.tell(line)
    try:
        reproduction.play(cells)
        reproduction.write()
    except KeyboardInterrupt as stop:
        how, code = interrupts.end_by(stop)
        print(f"{how}; the same command goes on", file=sys.stderr)
        return code
    return _tell(request, reproduction)


def command_of(request: Request, words: Sequence[str]) -> Command:
    """Read the words of a cell's command, with the data folder and the workers of this command."""
    from fedkern.comparison.reproduction import Command

    extensions.load_plugins(words)
    run = flags.parse_run(words)
    if (method := run.method) is None:
        raise UserError("its command names no method: write METHOD and the flags of a run.")
    for name, way in _OTHERWISE.items():
        if getattr(run, name, None) or name in run.settings:
            raise UserError(f"its command has {flags.flag(name)}: leave it out, as {way}.")
    options = key_values(run.options, "method_option")
    names = frozenset({*run.settings, *options})
    settings = {**run.settings, **request.settings}
    run = dataclasses.replace(run, command="reproduce", settings=settings, arguments={"options": options})
    return Command(method, names, lambda point, seed: config_of(run, point, seed))


def _tell(request: Request, reproduction: Reproduction) -> int:
    from fedkern.comparison.reproduction_table import text_table

    rows, out = reproduction.rows(), reproduction.out
    table = text_table(reproduction.paper, rows)
    return print_outcome(
        request, out, lambda: {"rows": [row.values() for row in rows], "folder": str(out)},
        dataclasses.replace(table, notes=()), [*table.notes, f"folder: {out}"], reproduction.tracebacks,
        [f"{name}: {text}" for name, text in reproduction.failures.items()],
    )  # fmt: skip
