"""Files that somebody else wrote: regular files alone are opened, and JSON is a value or a ValueError."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def standing(path: Path) -> str:
    """What stands at ``path``, links followed, in words; ``""`` for a regular file."""
    try:
        return _kind(path.stat().st_mode)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return "a link to nothing" if os.path.islink(path) else "missing"  # noqa: PTH114 (the name may be too long)


def special(path: Path) -> str:
    """What stands at ``path`` where it is neither a file nor a folder: to open a named pipe is to wait for a writer."""
    found = standing(path)
    return found if found in SPECIAL.values() else ""


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading.

    Raises:
        OSError: there is none, it cannot be opened, or it is a folder, a named pipe, a socket or a device.
    """
    try:
        _check(os.stat(path).st_mode, path)  # noqa: PTH116 (a device may act on being opened)
        # What replaced the file meanwhile is not waited for either.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError:
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    try:
        _check(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """The text of a regular file, line ends as ``\\n``.

    Raises:
        OSError: see :func:`open_regular`.
        UnicodeDecodeError: it is not in that encoding.
    """
    with io.TextIOWrapper(open_regular(path), encoding=encoding) as file:
        return file.read()


def parse_json(text: str) -> Any:
    """The value that JSON text stands for.

    Raises:
        ValueError: it is not JSON, or lists and objects stand too deep in one another.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists and objects stand too deep in one another") from None


def read_json(path: str | Path) -> Any:
    """The value in a regular JSON file.

    Raises:
        OSError: see :func:`open_regular`.
        ValueError: it is not UTF-8, or see :func:`parse_json`.
    """
    return parse_json(read_text(path))


def real_file(path: Path) -> tuple[int, int] | str:
    """What two paths have in common that lead to one file or folder: by links, hard links or mounts."""
    try:
        found = path.stat()
        return (found.st_dev, found.st_ino) if found.st_ino else str(path.resolve())
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
