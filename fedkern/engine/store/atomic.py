"""Files that are either complete or absent, and the lock of a run folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from fedkern import files
from fedkern.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: runs work there, but no lock keeps two processes apart
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".part"
LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT)


def write(path: Path, fill: Callable[[Path], object], *, durable: bool = True) -> None:
    """Lets ``fill`` write a temporary file beside ``path``, flushes it to the disk and renames it to ``path``.

    Without ``durable`` nothing is flushed: the file is complete or absent unless the machine itself stops.

    Raises:
        Unwritable: the disk is full or the folder cannot be written; ``path`` is then as it was before.
    """
    try:
        files.replace(path, fill, path.with_name(path.name + TEMPORARY), durable=durable)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Writes ``content`` to ``path``, completely or not at all."""
    write(path, lambda temporary: temporary.write_bytes(content))


class Unwritable(UserError):
    """A file or folder that could not be written.  A caller that knows the situation can give better advice.

    Attributes:
        problem: the sentence without the advice.
        full: whether the disk is full.
    """

    def __init__(self, problem: str, *, full: bool) -> None:
        super().__init__(f"{problem}: {'free some space' if full else 'put that right'}, then try again.")
        self.problem, self.full = problem, full


def unwritable(path: Path, error: Exception) -> Unwritable:
    """Makes an Unwritable of the error of a file or folder that could not be written."""
    reason = getattr(error, "strerror", None) or str(error)
    # safetensors gives the system's error number in its text alone.
    if getattr(error, "errno", None) in FULL or any(f"(os error {number})" in reason for number in FULL):
        return Unwritable(f"{path} cannot be written, the disk is full", full=True)
    return Unwritable(f"{path} cannot be written ({reason})", full=False)


class FolderLock:
    """Lock that keeps a second process out of a run folder; the system drops it when the process ends, however."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        try:
            file = self.path.open("a+")
        except OSError as error:
            raise unwritable(self.path, error) from None
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise UserError(
                f"{self.path.parent} is in use by process {owner}: wait for it, or choose another --out."
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
        except OSError as error:
            with suppress(OSError):
                file.close()  # closing tries to write once more
            raise unwritable(self.path, error) from None
        self._file = file
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
