"""``extend DIR --rounds R``: more rounds for a run."""

from __future__ import annotations

import dataclasses

from fedkern.cli.commands import run
from fedkern.cli.finished_runs import add_network, folder
from fedkern.cli.flags import RUN_FLAGS, TRACKERS, Parser, add
from fedkern.cli.request import Request
from fedkern.errors import UserError
from fedkern.settings.stored import load_settings
from fedkern.usercode import plugins


def add_flags(parser: Parser) -> None:
    """Adds the flags."""
    parser.add_folder("a finished run")
    add(parser, {
        "rounds": ("R", "communication rounds in all, those done included"),
        "data_root": ("DIR", "where the data files are, if they have moved"),
        "data": ("FILE.py:NAME", "the run's data again, where they name code"),
        "cache": ("DIR", "folder that keeps the decoded images"),
        "workers": ("N", "processes in which clients work side by side"),
        **{name: RUN_FLAGS[name] for name in (*TRACKERS, "quiet")},
    })  # fmt: skip
    add_network(parser, choice=False)


def checked(request: Request, parser: Parser) -> Request:
    """The request; raises UserError where the number of rounds is missing."""
    if "rounds" not in request.settings:
        raise UserError(f"{parser.prog} needs --rounds R, the communication rounds in all.")
    settings = {**request.settings}
    return dataclasses.replace(request, settings=settings, arguments={"rounds": settings.pop("rounds")})


def play(request: Request) -> int:
    """Gives the run more rounds and goes on with it."""
    run.trackers(request)  # a package that is not installed is told before anything is written
    return run.play(extended(request))


def extended(request: Request) -> Request:
    """Gives the run more rounds; the request to go on with it."""
    from fedkern.data.registry import check_readable
    from fedkern.engine.script_objects import ScriptObjects
    from fedkern.engine.store.extending import extend
    from fedkern.methods import METHODS
    from fedkern.report.live.progress import terminal
    from fedkern.report.names import say

    out = folder(request)
    stored = load_settings(out, device="cpu")
    plugins.check_given(request.plugins, stored.plugins, out)
    ScriptObjects().check_given(stored, out)  # before anything is moved
    check_readable(stored.data)
    before = {path.name for path in out.iterdir()}
    config = extend(out, request.arguments["rounds"])
    names = sorted({path.name for path in out.iterdir()} - before)
    lines = [f"results of the former network: {out / name}" for name in names]
    if spans := METHODS[config.method].spans:
        lines.append(f"{spans}: the network will not be that of a run of {config.rounds} rounds from the start")
    for text in () if request.quiet or request.json else lines:
        say(terminal(), text)
    return dataclasses.replace(request, command="resume", resume=out, folder=None, arguments={})
