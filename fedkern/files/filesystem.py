"""File handling: atomic replacement, a lock between processes, user paths, and safe reading of untrusted files."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
import shlex
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from fedkern.errors import UserError

SPECIAL = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def describe_file_kind(path: Path) -> str:
    """Name the kind of a file, links followed, or return ``""`` for a regular file."""
    try:
        return _kind(path.stat().st_mode)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return "a link to nothing" if os.path.islink(path) else "missing"  # noqa: PTH114 (the name may be too long)


def describe_special_file(path: Path) -> str:
    """Name a pipe, socket or device, ``""`` for anything else: opening a pipe would wait for a writer."""
    kind = describe_file_kind(path)
    return kind if kind in SPECIAL.values() else ""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading, or raise OSError."""
    try:
        _check(os.stat(path).st_mode, path)  # noqa: PTH116 (a device may act on being opened)
        # O_NONBLOCK: a named pipe that has replaced the file since the check does not block.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError:
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    try:
        _check(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@contextmanager
def report_unreadable(subject: object) -> Iterator[None]:
    """Turn a read error into a UserError that names ``subject``."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{subject} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


@contextmanager
def report_damage(sentence: str, way: str) -> Iterator[None]:
    """Turn an error about a file's content into a UserError: ``sentence``, reason, ``way`` out."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        raise UserError(f"{sentence} ({reason}): {way}.") from None


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """Return the text of a regular file, with line ends ``\\n``."""
    with io.TextIOWrapper(open_regular(path), encoding=encoding) as file:
        return file.read()


def explain_line_ends(path: Path, checksum: Callable[[bytes], object], due: object, size: int | None = None) -> str:
    """Return advice if only CRLF line ends make a file differ, else ``""``.

    ``due`` is the ``checksum`` of the first ``size`` bytes as written.
    """
    with suppress(OSError), open_regular(path) as file:
        if checksum(file.read().replace(b"\r\n", b"\n")[:size]) == due:
            mend = f"sed -i 's/\\r$//' {shlex.quote(str(path))}"
            return f", as its line ends became CRLF: mend the file by {mend}, and git by git config core.autocrlf false"
    return ""


def parse_json(text: str) -> Any:
    """Return the value of a JSON text, or raise ValueError, even if nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists and objects stand too deep in one another") from None


def read_json(path: str | Path) -> Any:
    """Return the value in a regular JSON file, see :func:`open_regular` and :func:`parse_json` for errors."""
    return parse_json(read_text(path))


def real_file(path: Path) -> tuple[int, int] | str:
    """Return a file's identity, equal for paths that lead to one file by links, hard links or mounts."""
    try:
        status = path.stat()
        return (status.st_dev, status.st_ino) if status.st_ino else str(path.resolve())
    except (OSError, RuntimeError):  # RuntimeError: links that lead to each other
        return str(path)


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return ""
    return "a folder" if stat.S_ISDIR(mode) else SPECIAL.get(stat.S_IFMT(mode), "of no known kind")


def _check(mode: int, path: str | Path) -> None:
    if kind := _kind(mode):
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, f"it is {kind}, not a regular file", str(path))


try:
    import fcntl
except ImportError:  # not a POSIX system: writers are not locked out
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part")
LINK = "it is a link, through which nothing is written"


def expand(path: str | Path) -> Path:
    """Expand a leading ``~`` or ``~name``, or raise UserError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        name = Path(path).parts[0]
        raise UserError(
            f"{path} begins with the home folder of {name[1:] or 'the user'}, which this machine does not know: write "
            f"the whole path, or ./{name} where a file or folder has that name."
        ) from None


def cache_folder(name: str) -> Path:
    """Return ``$FEDKERN_CACHE_DIR/name``, ``$XDG_CACHE_HOME/fedkern/name`` or ``~/.cache/fedkern/name``."""
    if folder := os.environ.get("FEDKERN_CACHE_DIR"):
        return expand(folder) / name
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else expand("~/.cache")) / "fedkern" / name


def absolute(path: str) -> str:
    """Return a path that is valid from any working folder."""
    return str(expand(path).absolute())


def absolute_folder(name: str) -> str:
    """Make a folder's path absolute, or return another text, such as a model's name, unchanged.

    A text names a folder if the folder exists or the text begins with ``.`` or ``~``.
    """
    return absolute(name) if name.startswith((".", "~")) or Path(name).is_dir() else name


def check_working_folder() -> None:
    """Raise UserError for a deleted working folder: libraries would end the process when looking it up."""
    try:
        Path.cwd()
    except OSError:
        raise UserError("The working folder has been deleted or cannot be read: change to another one.") from None


def check_text(text: str, subject: str, way: str = "rename the file or folder, or take a link to it") -> None:
    """Raise UserError for a string that is not UTF-8, because a run's files could not store the string."""
    try:
        text.encode()
    except UnicodeEncodeError:
        quote = text.encode(errors="backslashreplace").decode().replace("\\udc", "\\x")  # bytes, as Python reads them
        try:
            text.encode(errors="surrogateescape").decode()
        except UnicodeError:
            reason = f"bytes that are not UTF-8: {way}."
        else:
            reason = (
                "letters that Python does not read in this locale: set PYTHONUTF8=1 in the environment, or a locale "
                "of UTF-8."
            )
        raise UserError(f'{subject} "{quote}" has {reason}') from None


def replace(path: Path, fill: Callable[[Path], object], *, durable: bool = True) -> None:
    """Let ``fill`` write a new file beside ``path``, flush it if ``durable``, and rename it to ``path``.

    The file gets the mode that the user's umask allows, even if the writing library makes files private.  A link at
    ``path`` is replaced; its target stays.  ``path`` is unchanged if ``fill`` raises.
    """
    name = os.fsencode(path.name)[: 255 - len("..00000000.part")].decode(errors="ignore")
    temporary = path.with_name(f".{name}.{secrets.token_hex(4)}.part")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        mode = temporary.stat().st_mode
        fill(temporary)
        temporary.chmod(mode)
        if durable:
            with temporary.open("r+b") as file:  # Windows flushes only files that are open for writing
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def drop_temporaries(folder: Path, ours: Callable[[str], object]) -> None:
    """Delete files that interrupted :func:`replace` calls left behind, for names that are ``ours``."""
    for path in [*folder.iterdir()]:
        match = _TEMPORARY.fullmatch(path.name)
        if match and ours(match[1]):
            path.unlink(missing_ok=True)


def open_to_change(path: Path, mode: str, *, make: bool = False) -> BinaryIO:
    """Open a file to change it in place, never through a link: a run folder may come from anyone.

    ``mode``: ``"ab"``, which makes a missing file, or ``"r+b"``, which does so if ``make``.  OSError for links, files
    with a second hard link, and special files.
    """

    def opener(name: str, flags: int) -> int:
        if os.path.islink(name):  # noqa: PTH114 (O_NOFOLLOW alone has a misleading message)
            raise OSError(errno.ELOOP, LINK, name)
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | (os.O_CREAT if make else 0)
        descriptor = os.open(name, flags, 0o666)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(descriptor)
            raise OSError(errno.EMLINK, LINK if status.st_nlink > 1 else "it is no regular file", name)
        return descriptor

    return cast(BinaryIO, open(path, mode, opener=opener))


def is_own(path: Path) -> bool:
    """Return whether a file is this user's, always true on Windows."""
    return path.stat().st_uid == getattr(os, "geteuid", int)()


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    if sys.platform == "win32":
        return  # which cannot open a folder
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def hold_lock(lock: Path, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold a lock between processes, after waiting for its current holder.

    The lock file is never removed; the system releases the lock when the process ends.  File systems without locks are
    not protected.  ``waiting`` is called before a wait.
    """
    with open_to_change(lock, "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks
        yield


def check_new(out: Path, command: str) -> None:
    """Raise UserError if the output file ``out`` exists or its folder does not."""
    if out.exists():
        raise UserError(f"{out} is there already: name another one with --out, or remove it.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.parent} is no folder that {command} could write to: make it, or name another --out.")
