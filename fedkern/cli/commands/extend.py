"""``extend DIR --rounds R``: more rounds for a run."""

import dataclasses

from fedkern.cli.commands import run
from fedkern.cli.finished_runs import add_network, run_folder
from fedkern.cli.parser import RUN_FLAGS, TRACKERS, Parser, add_arguments
from fedkern.cli.request import Request
from fedkern.errors import UserError


def add_flags(parser: Parser) -> None:
    parser.add_folder("a finished run")
    add_arguments(parser, {
        "rounds": ("R", "communication rounds in total, including those done"),
        "data_root": ("DIR", "folder of the data files, if they have moved"),
        "data": ("FILE.py:NAME", "the run's data again, if they are code"),
        "choose": ("FILE.py:NAME", "the run's choice of clients again, if it is code"),
        "cache": ("DIR", "folder that keeps decoded images"),
        "workers": ("N", "processes that train clients in parallel"),
        **{name: RUN_FLAGS[name] for name in (*TRACKERS, "quiet")},
    })  # fmt: skip
    add_network(parser, choice=False)


def check_request(request: Request, parser: Parser) -> Request:
    if "rounds" not in request.settings:
        raise UserError(f"{parser.prog} needs --rounds R, the communication rounds in all.")
    settings = {**request.settings}
    return dataclasses.replace(request, settings=settings, arguments={"rounds": settings.pop("rounds")})


def play(request: Request) -> int:
    return run.play(dataclasses.replace(request, command="resume", resume=run_folder(request), folder=None))
