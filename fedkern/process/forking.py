"""Forks of a process: which threads bar them, and how a fork gets positions in open files of its own."""

from __future__ import annotations

import os
import socket
import stat
import threading
from contextlib import suppress
from pathlib import Path

from fedkern.files.filesystem import fcntl


def has_threads() -> bool:
    """Return whether threads that fedkern did not start run beside this one.

    A lock that such a thread holds at the moment of a fork would be held for ever in the new process.
    """
    names = ((thread.name, type(thread).__module__) for thread in threading.enumerate())
    # The board of a comparison is drawn by a thread of rich.
    return sum(not name.startswith("fedkern-") and not module.startswith("rich.") for name, module in names) > 1


def read_positions() -> dict[int, int]:
    """Return the position in every file that this process can read, by descriptor, without the standard streams."""
    positions: dict[int, int] = {}
    for descriptor in (int(link.name) for link in Path("/proc/self/fd").iterdir()):
        with suppress(OSError):  # that of the listing itself
            readable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
            if descriptor > 2 and readable and stat.S_ISREG(os.fstat(descriptor).st_mode):
                positions[descriptor] = os.lseek(descriptor, 0, os.SEEK_CUR)
    return positions


def reopen_files(positions: dict[int, int]) -> None:
    """Give this process files of its own at ``positions``, by descriptor: reading moves no other process's position.

    Raises:
        OSError: a file may not be opened any more.
    """
    for descriptor in positions.keys() & read_positions().keys():  # garbage may have been collected since
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND)
        file = os.open(f"/proc/self/fd/{descriptor}", flags)
        os.lseek(file, positions[descriptor], os.SEEK_SET)
        os.dup2(file, descriptor, inheritable=os.get_inheritable(descriptor))
        os.close(file)


def cut_connections(kept: int) -> None:
    """End this process's share in all sockets but the descriptor ``kept``.

    Two processes that spoke over one connection would get each other's answers.
    """
    descriptors = [int(link.name) for link in Path("/proc/self/fd").iterdir() if link.is_socket()]
    end, peer = socket.socketpair()
    peer.close()
    with end:
        for descriptor in {*descriptors} - {0, 1, 2, kept}:
            os.dup2(end.fileno(), descriptor, inheritable=False)
