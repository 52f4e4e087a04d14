"""Free ports, and the processes of a test's SuperLinks and SuperNodes."""

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path


def free_port() -> int:
    """Return a port of this machine without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_all(home: Path) -> None:
    """End all processes of :func:`processes_of`.

    Flower detaches some of its processes; these outlive their parent for a moment, or for good where nobody reaps it.
    """
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 2.0)):
        limit = time.monotonic() + patience
        asked: set[int] = set()
        while (alive := processes_of(home)) and time.monotonic() < limit:
            for pid in set(alive) - asked:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            asked.update(alive)
            time.sleep(0.1)


def processes_of(home: Path) -> list[int]:
    """Return the living processes of this user whose ``FLWR_HOME`` is this folder or in it, and their descendants.

    Returns:
        Their numbers in ascending order, without this process; empty if the system has no ``/proc``.
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
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        grown = bool(children)
    return sorted(found - {os.getpid()})
