"""Runs of a Flower project on a SuperLink: submitted, followed to their end, stopped.

Everything goes through Flower's own command ``flwr``, as a process of this interpreter.  Written for flwr 1.41, whose
``flwr run`` returns 0 for a run that fails later, and with ``--format json`` even for one that it refuses.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedkern.errors import RunFailed, UserError, nearest, printable
from fedkern.inputs import read_text

CONFIGURATION = "config.toml"
"""Flower's file of SuperLink connections, in the folder ``FLWR_HOME``."""
SIMULATED = (":local:", ":local-in-memory:")
"""Addresses that stand for Flower's simulation on this machine."""
PROJECT_FILE = "pyproject.toml"
SERVER_APP = "fedkern.flower.server_app:app"
"""The ServerApp of projects that play whole runs of fedkern."""
OWN = "fedkern"
"""Name of the connection in a configuration of one's own."""
_PAUSE = 2.0
"""Seconds between two questions after the state of a run whose log has ended early."""
_PATIENCE = 60.0
"""Seconds for a command that asks a SuperLink."""
_ATTEMPTS = 5
"""Questions in a row that may fail before a run counts as lost."""
_NOISE = ("using superlink", "displaying information", "listing all", "stopping run")
_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_RAY = re.compile(r"^\([^)]*pid=\d+[^)]*\) ?")


@dataclass(frozen=True)
class Connection:
    """A SuperLink as Flower's configuration names it.

    Attributes:
        home: the folder ``FLWR_HOME``.
        name: name of the connection in its ``config.toml``.
        address: ``host:port``, or one of `SIMULATED`.
    """

    home: Path
    name: str
    address: str

    @property
    def simulated(self) -> bool:
        """Whether the address stands for Flower's simulation on this machine."""
        return self.address in SIMULATED


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        run: the run's number, as text.
        status: Flower's status, for example ``"finished:completed"``.
        details: why it failed, in Flower's words; empty otherwise.
        record: what ``flwr ls --format json`` says of the run.
        log: the log of the ServerApp, or of the simulation.
    """

    run: str
    status: str
    details: str
    record: Mapping[str, Any]
    log: str

    @property
    def finished(self) -> bool:
        return self.status.startswith("finished")

    @property
    def completed(self) -> bool:
        return self.status == "finished:completed"


def users_home() -> Path:
    """The user's folder of Flower's configuration."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")


def find_connection(given: str | None) -> Connection | None:
    """The connection that a name means in the user's configuration.

    Args:
        given: name of a connection; None means the default one.

    Returns:
        The connection; None where the user has no configuration or no default, and where ``given`` is an address.

    Raises:
        UserError: the configuration cannot be read, or has no such connection.
    """
    path = users_home() / CONFIGURATION
    table: dict[str, Any] = {}
    if path.is_file():
        try:
            table = tomllib.loads(read_text(path)).get("superlink", {})
        except ValueError as error:  # not TOML, or not UTF-8
            raise UserError(f"{path} is not a TOML file ({error}): correct it, or name another FLWR_HOME.") from None
    entries = {name: entry for name, entry in table.items() if isinstance(entry, dict)}
    name = table.get("default") if given is None else given
    if name in entries:
        return Connection(path.parent, str(name), str(entries[name].get("address", SIMULATED[0])))
    if given is None or is_address(given):
        return None
    known = f"has {', '.join(entries)}" if entries else "has none"
    raise UserError(
        f'There is no SuperLink connection "{given}": {path} {known}.{nearest(given, entries)} Name one of them, or '
        "give the SuperLink's address as HOST:PORT."
    )


def is_address(text: str) -> bool:
    """Whether a text has the form ``host:port``."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and len(port) <= 5 and "/" not in text


def own_connection(home: Path, address: str, *, certificates: Path | None = None, insecure: bool = False) -> Connection:
    """Writes a configuration with one connection.

    Args:
        home: an existing folder, which becomes ``FLWR_HOME``.
        address: ``host:port``.
        certificates: PEM file of the authority that has signed the SuperLink's certificate; None: the system's.
        insecure: whether the SuperLink speaks plain HTTP.

    Raises:
        UserError: there is no such file.
    """
    lines = [f"address = {json.dumps(address)}"]
    if insecure:
        lines.append("insecure = true")
    if certificates is not None:
        if not certificates.is_file():
            raise UserError(f"{certificates} is not a file: give --root-certificates the authority's PEM file.")
        lines.append(f"root-certificates = {json.dumps(str(certificates.absolute()))}")
    head = f'[superlink]\ndefault = "{OWN}"\n\n[superlink.{OWN}]\n'
    (home / CONFIGURATION).write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    return Connection(home, OWN, address)


def check_project(project: Path) -> dict[str, Any]:
    """Checks that a folder holds a Flower project whose files ``flwr run`` leaves as they are.

    Returns:
        The project's section ``[tool.flwr.app]``.

    Raises:
        UserError: it does not.
    """
    path = project / PROJECT_FILE
    if not path.is_file():
        raise UserError(
            f"{project} is no Flower project, as it has no {PROJECT_FILE}: name the folder of one, or write one with "
            "python -m fedkern.run METHOD --flower DIR."
        )
    try:
        tools = tomllib.loads(read_text(path)).get("tool", {})
    except ValueError as error:  # not TOML, or not UTF-8
        raise UserError(f"{path} is not a TOML file ({error}).") from None
    settings = tools.get("flwr") if isinstance(tools, dict) else None
    if not isinstance(settings, dict) or not isinstance(settings.get("app"), dict):
        raise UserError(f"{path} has no section [tool.flwr.app]: name the folder of a Flower project.")
    if "federations" in settings:  # flwr 1.41 would move this section into FLWR_HOME and comment it out
        raise UserError(
            f"{path} has the section [tool.flwr.federations], which flwr 1.41 no longer reads: remove the section, and "
            "name the SuperLink with --superlink or the number of simulated nodes with --nodes."
        )
    app: dict[str, Any] = settings["app"]
    return app


def clients_of(app: dict[str, Any]) -> int | None:
    """Number of clients of a fedkern run, each of which needs a node.

    Args:
        app: the section ``[tool.flwr.app]``.

    Returns:
        The number; 0 where the project leaves it to the data set; None for an app of another kind.
    """
    components, config = app.get("components"), app.get("config")
    if not isinstance(components, dict) or components.get("serverapp") != SERVER_APP:
        return None
    count = config.get("clients") if isinstance(config, dict) else None
    return count if isinstance(count, int) else 0


def environment(home: Path) -> dict[str, str]:
    """The environment of Flower's processes: their configuration folder, and nothing sent to Flower's makers."""
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }


class Submitted:
    """A run on a SuperLink.

    Args:
        connection: the SuperLink.
        run: the run's number.

    Attributes:
        log: what :meth:`follow` has shown so far.
    """

    def __init__(self, connection: Connection, run: str) -> None:
        self.connection, self.run, self.log = connection, run, ""

    @classmethod
    def start(
        cls,
        connection: Connection,
        project: Path,
        *,
        run_config: Sequence[str] = (),
        federation: str | None = None,
        federation_config: Sequence[str] = (),
    ) -> Submitted:
        """Submits a project.

        Args:
            connection: the SuperLink.
            project: folder of the Flower project.
            run_config: ``"key=value ..."`` in TOML, for keys of the project's ``[tool.flwr.app.config]``.
            federation: Flower's name of a federation on the SuperLink, ``@account/name``.
            federation_config: ``"key=value ..."`` of a simulation.

        Raises:
            UserError: Flower refuses the project or a setting, or the SuperLink does not answer.
        """
        words = ["run", str(project), connection.name]
        words += [] if federation is None else ["--federation", federation]
        words += [word for text in run_config for word in ("--run-config", text)]
        words += [word for text in federation_config for word in ("--federation-config", text)]
        process = _flwr(connection, [*words, "--format", "json"])
        try:
            answer = _read(process, _PATIENCE * 3)
        except KeyboardInterrupt:  # a run that is submitted by now must not go on unseen
            with suppress(UserError, KeyError):
                cls(connection, str(_read(process, _PATIENCE)["run-id"])).stop()
            raise
        return cls(connection, str(answer["run-id"]))

    def follow(self, show: Callable[[str], None]) -> Outcome:
        """Waits for the end of the run.

        Args:
            show: is given the log's lines as they come, with their line ends.

        Raises:
            RunFailed: the SuperLink has stopped answering.
        """
        failures = 0
        while True:
            whole = self._stream(show)
            try:
                outcome = self.state()
            except UserError as error:
                failures += 1
                if failures == _ATTEMPTS:
                    raise RunFailed(f"The SuperLink no longer tells how run {self.run} goes on: {error}") from None
            else:
                failures = 0
                if outcome.finished:
                    if not whole:
                        self._stream(show)
                    return replace(outcome, log=self.log)
            time.sleep(_PAUSE)

    def state(self) -> Outcome:
        """Asks the SuperLink what has become of the run.

        Raises:
            UserError: the SuperLink does not answer, or does not know the run.
        """
        found = _ask(self.connection, "ls", self.connection.name, "--run-id", self.run)
        try:
            record = found["runs"][0]
            status, details = str(record["status"]), str(record.get("status-details") or "N/A")
        except (KeyError, IndexError, TypeError):
            raise UserError(f"The SuperLink does not tell the state of run {self.run}.") from None
        details = "" if details == "N/A" else printable(details)
        return Outcome(self.run, status, details, record, self.log)

    def stop(self) -> None:
        """Asks the SuperLink to stop the run.

        Raises:
            UserError: the SuperLink refuses, for example as the run has ended, or does not answer.
        """
        _ask(self.connection, "stop", self.run, self.connection.name)

    def _stream(self, show: Callable[[str], None]) -> bool:
        """Shows the log until the stream ends: with the run, or with the connection to the SuperLink.

        A new stream begins with the first line of the log; what was shown is left out.

        Returns:
            Whether the stream ended with the run.
        """
        process = _flwr(self.connection, ["log", self.run, self.connection.name], errors=subprocess.DEVNULL)
        assert process.stdout is not None
        known, seen = self.log, ""
        try:
            for line in process.stdout:
                if not seen and _CODES.sub("", line).lower().startswith(_NOISE):
                    continue
                seen += line
                if len(seen) > len(known):
                    new = seen[max(len(known), len(seen) - len(line)) :]
                    self.log += new
                    show(new)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
            return process.returncode == 0
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            process.stdout.close()


def tracebacks(log: str) -> list[str]:
    """The tracebacks in a log, without colours and without Ray's prefixes; causes stand before what they caused."""
    found: list[list[str]] = []
    inside = False
    for raw in log.splitlines():
        line = _RAY.sub("", _CODES.sub("", raw)).rstrip()
        if _HEAD in line:
            line = line[line.index(_HEAD) :]
            chained = found and found[-1] and found[-1][-1].startswith(_CHAINS)
            if not chained:
                found.append([])
            found[-1].append(line)
            inside = True
        elif inside:
            found[-1].append(line)
            inside = line.startswith(" ")
        elif found and line.startswith(_CHAINS):
            found[-1].append(line)
    return ["\n".join(lines) for lines in found]


_HEAD = "Traceback (most recent call last):"
_CHAINS = ("During handling of the above exception", "The above exception was the direct cause")


def _flwr(connection: Connection, words: Sequence[str], errors: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Starts ``flwr``; Ctrl-C at the terminal reaches this process alone, which then decides."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "flwr.cli.app", *words],
        env=environment(connection.home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def _ask(connection: Connection, *words: str) -> dict[str, Any]:
    """The JSON answer of a command of ``flwr``."""
    return _read(_flwr(connection, [*words, "--format", "json"]), _PATIENCE)


def _read(process: subprocess.Popen[str], patience: float) -> dict[str, Any]:
    try:
        printed, complaint = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise UserError(
            f"The SuperLink has not answered for {patience:g} seconds: check its address and the network."
        ) from None
    begin, end = printed.find("{"), printed.rfind("}")
    answer: Any = None
    with suppress(ValueError):
        answer = json.loads(printed[begin : end + 1])
    if isinstance(answer, dict) and answer.get("success"):
        return answer
    text = str(answer.get("error-message", "")) if isinstance(answer, dict) else ""
    raise UserError(f"Flower: {_reason(text or complaint or printed)}")


def _reason(text: str) -> str:
    """What Flower has to say, as one sentence without the lines that it always prints."""
    lines = [_CODES.sub("", line).strip(" \t│╭╮╰╯─") for line in text.splitlines()]
    kept = [line for line in lines if line and not _noise(line)]
    return " ".join(kept) or "no reason given."


def _noise(line: str) -> bool:
    return line.lower().lstrip("🔍📄✋ ").startswith(_NOISE)
