"""Complete or absent writes of files and folders, never through a link, with failures as UserErrors."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from fedkern.errors import UserError
from fedkern.files import filesystem

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def report_unwritable(path: Path) -> Iterator[None]:
    """Turn an error of the file or folder ``path`` into an Unwritable."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from None


def write(path: Path, fill: Callable[[Path], object], *, durable: bool = True) -> None:
    """Write and rename a new file, see :func:`filesystem.replace`, and flush it if ``durable``.

    Without ``durable`` the file is complete or absent unless the machine itself stops.
    """
    with report_unwritable(path):
        filesystem.replace(path, fill, durable=durable)


@contextmanager
def open_in_place(path: Path, mode: str, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a file to change it in place, see :func:`filesystem.open_to_change`, and flush at the end if ``durable``."""
    with report_unwritable(path), filesystem.open_to_change(path, mode) as file:
        yield file
        if durable:
            file.flush()
            os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Flush a file to the disk, or raise Unwritable."""
    with report_unwritable(path), path.open("r+b") as file:
        os.fsync(file.fileno())


def make_folder(path: Path, *, fresh: bool = False) -> None:
    """Make a folder with its parents, which must not exist if ``fresh``, or raise Unwritable."""
    with report_unwritable(path):
        if path.is_symlink():
            raise OSError(errno.ELOOP, filesystem.LINK, str(path))
        path.mkdir(parents=True, exist_ok=not fresh)


@contextmanager
def new_folder(path: Path, work: str) -> Iterator[Path]:
    """Yield a folder beside ``path``, which must not exist, that is renamed to it at the end. An error leaves nothing.

    ``work`` is what fills the folder, in error messages.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{part} is there: an earlier {work} was killed or another one runs; remove it once nothing writes to it, "
            "or name another folder with --out."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}): name another folder with --out.") from None
    try:
        yield part
        part.rename(path)
        filesystem.sync_folder(path.parent)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # of a progress line
            raise unwritable(path, error) from None
        raise


def write_bytes(path: Path, content: bytes) -> None:
    write(path, lambda temporary: temporary.write_bytes(content))


class Unwritable(UserError):
    """Error of a file or folder that cannot be written.

    Attributes:
        problem: the sentence without advice; a caller that knows the situation can give better advice.
        full: whether the disk is full.
    """

    def __init__(self, problem: str, *, full: bool) -> None:
        super().__init__(f"{problem}: {'free some space' if full else 'put that right'}, then try again.")
        self.problem, self.full = problem, full


def unwritable(path: Path, error: Exception) -> Unwritable:
    reason = getattr(error, "strerror", None) or str(error)
    # safetensors gives the system's error number only in its text.
    if getattr(error, "errno", None) in FULL or any(f"(os error {number})" in reason for number in FULL):
        return Unwritable(f"{path} cannot be written, the disk is full", full=True)
    return Unwritable(f"{path} cannot be written ({reason})", full=False)
