"""Files that are either complete or absent, one writer at a time, and paths as users write them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedkern.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing keeps two writers apart there
    fcntl = None  # type: ignore[assignment]


def expand(path: str | Path) -> Path:
    """``path`` with the user's home folder in the place of a leading ``~``, and another user's in that of ``~name``.

    Raises:
        UserError: nobody of that name has a home folder on this machine.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        name = Path(path).parts[0]
        raise UserError(
            f"{path} begins with the home folder of {name[1:] or 'the user'}, which this machine does not know: write "
            f"the whole path, or ./{name} where a file or folder has that name."
        ) from None


def cache_folder(name: str) -> Path:
    """``$FEDKERN_CACHE_DIR/name``, by default ``$XDG_CACHE_HOME/fedkern/name`` or ``~/.cache/fedkern/name``.

    Raises:
        UserError: the user has no home folder, and nothing else says where.
    """
    if own := os.environ.get("FEDKERN_CACHE_DIR"):
        return expand(own) / name
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else expand("~/.cache")) / "fedkern" / name


def absolute(path: str) -> str:
    """The same path from the root on, so that it holds in any folder.

    Raises:
        UserError: see :func:`expand`.
    """
    return str(expand(path).absolute())


def absolute_folder(name: str) -> str:
    """What may be a folder or a name: :func:`absolute` where there is such a folder or it begins like a path.

    Raises:
        UserError: see :func:`expand`.
    """
    return absolute(name) if name.startswith((".", "~")) or Path(name).is_dir() else name


def check_text(text: str, what: str) -> None:
    """Raises UserError for a string with bytes that are not UTF-8, which a run's files could not hold.

    Args:
        text: as the system gives it.
        what: what it is, for the message.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode(errors="backslashreplace").decode().replace("\\udc", "\\x")  # bytes, as Python reads them
        raise UserError(
            f'{what} "{shown}" has bytes that are not UTF-8: rename the file or folder, or take a link to it.'
        ) from None


def replace(path: Path, fill: Callable[[Path], object], temporary: Path) -> None:
    """Lets ``fill`` write ``temporary``, flushes it to the disk and renames it to ``path``.

    The file gets the mode that the user's umask allows, also from libraries that make theirs private.

    Raises:
        OSError, or what ``fill`` raises: ``path`` is then as it was before.
    """
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        fill(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` durable."""
    if os.name != "posix":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def one_writer(lock: Path) -> Iterator[None]:
    """Waits until no other process is inside with the same ``lock``, a file that is made and stays.

    The system lets go of it when the process ends, however it ends.  Where the file system knows no locks, nothing
    waits.

    Raises:
        OSError: the file cannot be made.
    """
    with lock.open("a") as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
