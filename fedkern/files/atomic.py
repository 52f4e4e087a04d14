"""Files and folders written completely or not at all, and never through a link.

Failures are UserErrors.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from fedkern.errors import UserError
from fedkern.files import filesystem

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, an error of the file or folder ``path`` becomes an Unwritable."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from None


def write(path: Path, fill: Callable[[Path], object], *, durable: bool = True) -> None:
    """Lets ``fill`` write a new file beside ``path``, flushes it to the disk and renames it to ``path``.

    Without ``durable`` nothing is flushed: the file is complete or absent unless the machine itself stops.

    Raises:
        Unwritable: the disk is full or the folder cannot be written; ``path`` is then as it was before.
    """
    with writing(path):
        filesystem.replace(path, fill, durable=durable)


@contextmanager
def changing(path: Path, mode: str, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a file that is changed in place (see :func:`filesystem.open_to_change`).

    It is on the disk at the end if ``durable``.

    Raises:
        Unwritable: the file is a link, or cannot be opened or written.
    """
    with writing(path), filesystem.open_to_change(path, mode) as file:
        yield file
        if durable:
            file.flush()
            os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Flushes a file to the disk.

    Raises Unwritable where that fails.
    """
    with writing(path), path.open("rb") as file:
        os.fsync(file.fileno())


def make_folder(path: Path, *, fresh: bool = False) -> None:
    """Make a folder inside a run folder with its parents.

    With ``fresh`` it must not exist.

    Raises:
        Unwritable: the folder is a link, or cannot be made.
    """
    with writing(path):
        if path.is_symlink():
            raise OSError(errno.ELOOP, filesystem.LINK, str(path))
        path.mkdir(parents=True, exist_ok=not fresh)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, completely or not at all."""
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
    """Make an Unwritable of the error of a file or folder that could not be written."""
    reason = getattr(error, "strerror", None) or str(error)
    # safetensors gives the system's error number in its text alone.
    if getattr(error, "errno", None) in FULL or any(f"(os error {number})" in reason for number in FULL):
        return Unwritable(f"{path} cannot be written, the disk is full", full=True)
    return Unwritable(f"{path} cannot be written ({reason})", full=False)
