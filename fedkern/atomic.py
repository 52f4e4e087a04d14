"""Files and folders written completely or not at all, and never through a link; failures are UserErrors."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from fedkern import files
from fedkern.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


def write(path: Path, fill: Callable[[Path], object], *, durable: bool = True) -> None:
    """Lets ``fill`` write a new file beside ``path``, flushes it to the disk and renames it to ``path``.

    Without ``durable`` nothing is flushed: the file is complete or absent unless the machine itself stops.

    Raises:
        Unwritable: the disk is full or the folder cannot be written; ``path`` is then as it was before.
    """
    try:
        files.replace(path, fill, durable=durable)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from None


def change(path: Path, mode: str, *, make: bool = False) -> BinaryIO:
    """Opens a file to change it in place (see :func:`fedkern.files.open_to_change`).

    Raises:
        Unwritable: the file is a link or cannot be opened.
    """
    try:
        return files.open_to_change(path, mode, make=make)
    except OSError as error:
        raise unwritable(path, error) from None


def make_folder(path: Path, *, fresh: bool = False) -> None:
    """Makes a folder inside a run folder with its parents; with ``fresh`` it must not exist.

    Raises:
        Unwritable: the folder is a link, or cannot be made.
    """
    try:
        files.make_folder(path, fresh=fresh)
    except OSError as error:
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
