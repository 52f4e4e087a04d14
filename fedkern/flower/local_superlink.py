"""A SuperLink of this process's own that simulates the nodes, and the end of everything that it has started.

Flower's ``:local:`` starts a SuperLink on a fixed port, which outlives the run, and takes any that answers there for
its own.  This one has a port and a configuration of its own and ends with the block.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedkern.errors import RunFailed, UserError
from fedkern.flower.superlink_runs import Connection, environment, own_connection

LOG = "superlink.log"
_READY = "Uvicorn running on"
_TAKEN = "address already in use"
_START, _END = 120.0, 10.0
"""Most seconds until a SuperLink answers, and until its processes have ended."""
_TRIES = 5


@contextmanager
def simulating(home: Path) -> Iterator[Connection]:
    """Runs a SuperLink that simulates its nodes, for the block.

    Args:
        home: an empty folder for its configuration and its log.

    Yields:
        The connection to it.

    Raises:
        UserError: Ray or Flower's commands are not installed.
        RunFailed: the SuperLink does not start.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "Flower's simulation needs Ray, which is not installed: pip install 'flwr[simulation]>=1.41,<1.43', or "
            "name a SuperLink with --superlink."
        )
    settings = environment(home)
    settings["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), settings.get("PATH", os.defpath)])
    if shutil.which("flower-superexec", path=settings["PATH"]) is None:
        raise UserError("Flower's command flower-superexec is not on PATH: activate the environment that has flwr.")
    process, port = _started(home, settings)
    try:
        yield own_connection(home, f"127.0.0.1:{port}", insecure=True)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END)
        end_all(home)
        process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _started(home: Path, settings: dict[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    """A SuperLink that answers, and its port; another port is tried where somebody was faster."""
    log = home / LOG
    for _ in range(_TRIES):
        port = free_port()
        command = ["--insecure", "--simulation", "--disable-runtime-dependency-installation", "--host", "127.0.0.1"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from flwr.superlink.cli import flower_superlink; flower_superlink()",
                 *command, "--port", str(port)],
                env=settings, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        try:
            if _answers(process, log):
                return process, port
        except BaseException:
            process.kill()
            process.wait()
            end_all(home)
            raise
        text = log.read_text(errors="replace")
        process.kill()
        process.wait()
        end_all(home)
        if _TAKEN not in text:
            break
    raise RunFailed(f"Flower's SuperLink has not started: {' '.join(text.split()[-60:])}")


def _answers(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Waits until a SuperLink says in its log that it answers; False where it ends or takes too long."""
    limit = time.monotonic() + _START
    while process.poll() is None and time.monotonic() < limit:
        if _READY in log.read_text(errors="replace"):
            return True
        time.sleep(0.1)
    return False


def end_all(home: Path) -> None:
    """Ends all processes of :func:`processes_of`.

    Flower detaches some of its processes; these outlive their parent for a moment, or for good where nobody reaps it.
    """
    for number, patience in ((signal.SIGTERM, _END), (signal.SIGKILL, 2.0)):
        limit = time.monotonic() + patience
        asked: set[int] = set()
        while (alive := processes_of(home)) and time.monotonic() < limit:
            for pid in set(alive) - asked:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            asked.update(alive)
            time.sleep(0.1)


def processes_of(home: Path) -> list[int]:
    """Living processes of this user whose ``FLWR_HOME`` is this folder or lies in it, and their descendants.

    Returns:
        Their numbers in ascending order, without this process; empty where the system has no ``/proc``.
    """
    mark = f"FLWR_HOME={home}".encode()
    parents: dict[int, int] = {}
    marked: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):  # it has ended, or is somebody else's
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z":
                continue
            parents[int(folder.name)] = int(parent)
            values = (folder / "environ").read_bytes().split(b"\0")
            if any(value == mark or value.startswith(mark + b"/") for value in values):
                marked.add(int(folder.name))
    found, grown = set(marked), True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return sorted(found - {os.getpid()})
