"""The command ``flower PROJECT_DIR``: runs a Flower project to its end and tells in the exit code how it ended."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fedkern.cli.command_parser import add_common, command_parser, read
from fedkern.cli.flags import COMMANDS, PROGRAM, Parser, check_filled, first, whole_number
from fedkern.cli.request import Request
from fedkern.errors import RunFailed, UserError, printable
from fedkern.files import expand, replace

if TYPE_CHECKING:
    from fedkern.flower.superlink_runs import Connection, Outcome, Submitted

NAME = "flower"
LOG, RECORD = "log.txt", "run.json"
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def _parser() -> Parser:
    about = f"{COMMANDS[NAME][:1].upper()}{COMMANDS[NAME][1:]}. It needs pip install 'fedkern[flower]'."
    parser = command_parser(NAME, about)
    parser.usage = f"{PROGRAM} {NAME} PROJECT_DIR [flags]"
    parser.add_argument("folder", nargs="?", metavar="PROJECT_DIR", help="folder of the Flower project")
    parser.add_argument("--superlink", metavar="NAME|HOST:PORT",
                        help="a connection of Flower's configuration, or the SuperLink's address. Default: the "
                             "configuration's default, else a simulation on this machine")  # fmt: skip
    parser.add_argument("--root-certificates", metavar="FILE",
                        help="PEM file of the authority that has signed the certificate of HOST:PORT; default: the "
                             "system's authorities")  # fmt: skip
    parser.add_argument("--insecure", action="store_true", help="HOST:PORT speaks plain HTTP")
    parser.add_argument("--federation", metavar="@ACCOUNT/NAME", help="Flower's federation on the SuperLink")
    parser.add_argument(
        "--nodes", metavar="N", help="simulated SuperNodes; default: the clients of a fedkern run, for other apps 2"
    )
    parser.add_argument("--run-config", action="append", default=[], metavar="'key=value ...'",
                        help="settings of the project's [tool.flwr.app.config], in TOML; repeatable")  # fmt: skip
    parser.add_argument("--federation-config", action="append", default=[], metavar="'key=value ...'",
                        help="Flower's settings of a simulation, such as client-resources-num-cpus=2; "
                             "repeatable")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help=f"folder for the run's log ({LOG}) and Flower's record of the run "
                                                     f"({RECORD})")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no log, unless the run fails")
    add_common(parser, "Flower's record of the run")
    return parser


def parse(words: Sequence[str]) -> Request | None:
    """Reads the command; None if the words are another command.

    Raises:
        UserError: an unknown flag, an invalid value, or no folder.
    """
    if first(words) != NAME:
        return None
    parser = _parser()
    found = read(parser, NAME, words)
    if found.help:
        return Request("help", help=parser.format_help())
    given = ("superlink", "root_certificates", "federation", "nodes", "out")
    check_filled({name: getattr(found, name) for name in given})
    if not found.folder:
        raise UserError(f"{PROGRAM} {NAME} needs the folder of a Flower project.")
    nodes = None if found.nodes is None else whole_number(found.nodes)
    if nodes is not None and nodes < 1:
        raise UserError(f'--nodes must be a whole number of at least 1, not "{found.nodes}".')
    if found.insecure and found.root_certificates:
        raise UserError("--insecure means that there is no certificate: leave out --root-certificates or --insecure.")
    return Request(
        NAME,
        folder=Path(found.folder),
        out=Path(found.out) if found.out else None,
        quiet=found.quiet,
        json=found.json,
        arguments={
            "superlink": found.superlink,
            "certificates": expand(found.root_certificates) if found.root_certificates else None,
            "insecure": found.insecure,
            "federation": found.federation,
            "nodes": nodes,
            "run_config": tuple(found.run_config),
            "federation_config": tuple(found.federation_config),
        },
    )


def flower(request: Request) -> int:
    """Runs the project; shows the run's log on standard error as it comes.

    Returns:
        The exit code, 0.

    Raises:
        UserError: Flower is not installed, or refuses the project; exit code 2.
        RunFailed: the run failed or was stopped; exit code 1.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the run was stopped.
    """
    importlib.import_module("fedkern.flower.adapter")  # says which flwr is needed
    from fedkern.flower import superlink_runs

    assert request.folder is not None
    app = superlink_runs.check_project(request.folder)
    _check_free(request.out)
    arguments, begin = request.arguments, time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="fedkern-flower-", ignore_cleanup_errors=True) as home,
        _connected(request, Path(home), superlink_runs.clients_of(app)) as (connection, simulated),
    ):
        simulation = arguments["federation_config"]
        if simulated:
            nodes = superlink_runs.clients_of(app) if arguments["nodes"] is None else arguments["nodes"]
            count = f" num-supernodes={nodes}" if nodes else ""
            simulation = (f"client-resources-num-cpus=1{count}", *simulation)
        where = "a simulation on this machine" if simulated else f"{connection.name} ({connection.address})"
        _say(request, f"SuperLink: {where}")
        submitted = superlink_runs.Submitted.start(
            connection,
            request.folder,
            run_config=arguments["run_config"],
            federation=arguments["federation"],
            federation_config=simulation,
        )
        outcome = _to_the_end(request, submitted)
    _keep(request.out, outcome)
    if not outcome.completed:
        if request.quiet or request.json:
            _show_failure(outcome)
        how = "was stopped" if outcome.status.endswith("stopped") else "failed"
        why = f": {outcome.details}" if outcome.details else ""
        raise RunFailed(f"Run {outcome.run} {how}{why}")
    if request.json:
        print(json.dumps(outcome.record, indent=2))
    elif not request.quiet:
        print(f"run {outcome.run}: completed in {time.monotonic() - begin:.0f} s{_traffic(outcome)}")
        if request.out is not None:
            print(f"log and record: {request.out}")
    return 0


@contextmanager
def _connected(request: Request, home: Path, clients: int | None) -> Iterator[tuple[Connection, bool]]:
    """The SuperLink that the flags and the user's configuration name, and whether it is a simulation of one's own.

    Raises:
        UserError: flags that contradict each other, a connection that does not exist, or an unknown number of nodes.
    """
    from fedkern.flower import local_superlink, superlink_runs

    arguments = request.arguments
    given: str | None = arguments["superlink"]
    found = superlink_runs.find_connection(given)
    of_address = [flag for flag, name in (("--root-certificates", "certificates"), ("--insecure", "insecure"))
                  if arguments[name]]  # fmt: skip
    if of_address and (given is None or found is not None):
        raise UserError(f"{of_address[0]} belongs to an address: give --superlink HOST:PORT with it.")
    simulated = given is None if found is None else found.simulated
    if not simulated and (arguments["nodes"] is not None or arguments["federation_config"]):
        flag = "--nodes" if arguments["nodes"] is not None else "--federation-config"
        raise UserError(f"{flag} is for simulations: the SuperLink has the nodes that have connected to it.")
    if simulated:
        if clients == 0 and arguments["nodes"] is None:
            raise UserError(
                "The project leaves its number of clients to the data set: give that number with --nodes N."
            )
        with local_superlink.simulating(home) as connection:
            yield connection, True
    elif found is not None:
        yield found, False
    else:
        assert given is not None
        certificates, insecure = arguments["certificates"], arguments["insecure"]
        yield superlink_runs.own_connection(home, given, certificates=certificates, insecure=insecure), False


def _to_the_end(request: Request, submitted: Submitted) -> Outcome:
    """Follows a run to its end; stops it at Ctrl-C."""
    show: Callable[[str], None] = _ignore if request.quiet or request.json else _show
    _say(request, f"run {submitted.run} is submitted")
    try:
        return submitted.follow(show)
    except KeyboardInterrupt:
        print(f"stopping run {submitted.run} ...", file=sys.stderr)
        with suppress(UserError):  # it has ended, or the SuperLink has gone
            submitted.stop()
        raise


def _say(request: Request, text: str) -> None:
    if not (request.quiet or request.json):
        print(printable(text), file=sys.stderr, flush=True)


def _ignore(line: str) -> None:
    """Shows nothing."""


def _show(line: str) -> None:
    """Writes a line of a log, with colours on a terminal alone and without other control characters."""
    parts = _COLOUR.split(line)
    shown = [part if i % 2 == 0 else part * sys.stderr.isatty() for i, part in enumerate(parts)]
    sys.stderr.write("".join(part if _COLOUR.fullmatch(part) else printable(part) for part in shown))
    sys.stderr.flush()


def _show_failure(outcome: Outcome) -> None:
    """Writes the tracebacks of a log that was not shown; its last lines where it has none."""
    from fedkern.flower.superlink_runs import tracebacks

    found = tracebacks(outcome.log) or ["\n".join(outcome.log.splitlines()[-20:])]
    for text in found[-3:]:
        for line in text.splitlines():
            _show(line + "\n")


def _traffic(outcome: Outcome) -> str:
    found = outcome.record.get("network-traffic")
    total = found.get("total-bytes") if isinstance(found, dict) else None
    return f", {total / 1e6:.1f} MB between SuperLink and SuperNodes" if isinstance(total, int) and total else ""


def _check_free(out: Path | None) -> None:
    """Raises UserError where the folder for log and record holds one already, or cannot be a folder."""
    if out is None:
        return
    for path in (out / LOG, out / RECORD):
        if path.exists():
            raise UserError(f"{path} exists: name another folder with --out.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder with --out.")


def _keep(out: Path | None, outcome: Outcome) -> None:
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    _write(out / LOG, _COLOUR.sub("", outcome.log))
    _write(out / RECORD, json.dumps(outcome.record, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


COMMAND_TABLE = {NAME: flower}
