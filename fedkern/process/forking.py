"""Forks of a process: threads that prevent them, and separate positions in open files."""

import os
import socket
import stat
import threading
from contextlib import suppress
from pathlib import Path

from fedkern.files.filesystem import fcntl


def has_threads() -> bool:
    """Return whether threads that fedkern did not start run beside this one.

    A lock that such a thread holds during a fork would be held forever in the new process.
    """
    names = ((thread.name, type(thread).__module__) for thread in threading.enumerate())
    # A thread of rich draws a comparison's board.
    return sum(not name.startswith("fedkern-") and not module.startswith("rich.") for name, module in names) > 1


def read_positions() -> dict[int, int]:
    """Return the position in every readable file by descriptor, without standard streams."""
    positions: dict[int, int] = {}
    for descriptor in (int(link.name) for link in Path("/proc/self/fd").iterdir()):
        with suppress(OSError):  # the descriptor of the listing itself
            readable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
            if descriptor > 2 and readable and stat.S_ISREG(os.fstat(descriptor).st_mode):
                positions[descriptor] = os.lseek(descriptor, 0, os.SEEK_CUR)
    return positions


def reopen_files(positions: dict[int, int]) -> None:
    """Reopen files at ``positions`` by descriptor, so that reading moves no other process's position."""
    for descriptor in positions.keys() & read_positions().keys():  # garbage may have been collected since
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND)
        file = os.open(f"/proc/self/fd/{descriptor}", flags)
        os.lseek(file, positions[descriptor], os.SEEK_SET)
        os.dup2(file, descriptor, inheritable=os.get_inheritable(descriptor))
        os.close(file)


def cut_connections(kept: int) -> None:
    """Close all sockets but ``kept``: processes that share a connection would get each other's answers."""
    descriptors = [int(link.name) for link in Path("/proc/self/fd").iterdir() if link.is_socket()]
    end, peer = socket.socketpair()
    peer.close()
    with end:
        for descriptor in {*descriptors} - {0, 1, 2, kept}:
            os.dup2(end.fileno(), descriptor, inheritable=False)
