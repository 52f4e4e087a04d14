"""Safe reading of untrusted files: regular files only, and ValueError for any malformed JSON."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

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
