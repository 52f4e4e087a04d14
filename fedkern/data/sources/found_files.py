"""Finding and reading the files of a data set, plain or gzip-compressed, with one clear sentence per error."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from fedkern.errors import UserError
from fedkern.files.filesystem import expand
from fedkern.files.inputs import open_regular

MOST = 1 << 32
"""Most bytes of content of a ``.gz`` file, whatever its header announces."""


def find_folder(root: str | Path | None, data: str, subfolders: Sequence[str], files: Sequence[str]) -> Path:
    """Return the first of ``root/subfolder`` (then ``root`` itself) that holds any of ``files``, plain or ``.gz``.

    Named subfolders come first: MNIST and Fashion-MNIST share their file names, so a flat ``root`` is the weaker hint.

    Raises:
        UserError: no root given, root is not a folder, or no folder holds any of the files.
    """
    folder = need_root(root, data, files[0])
    for candidate in (*(folder / name for name in subfolders), folder):
        if any(find_file(candidate, name) for name in files):
            return candidate
    looked = ", ".join(["DIR", *(f"DIR/{name}" for name in subfolders)])
    raise UserError(
        f'data set "{data}": no file {files[0]} (or {files[0]}.gz) found under {folder} (looked in {looked})'
    )


def need_root(root: str | Path | None, data: str, example: str) -> Path:
    """Return ``root``, an existing folder.

    Raises:
        UserError: it is not given, or no folder.
    """
    if root is None:
        raise UserError(
            f'data set "{data}" is read from files such as {example}: name their folder with --data-root DIR'
        )
    folder = expand(root)
    if not folder.is_dir():
        raise UserError(f'data set "{data}": the data root {folder} is not a folder')
    return folder


def find_file(folder: Path, name: str) -> Path | None:
    """``folder/name`` or else ``folder/name.gz``, whichever exists.

    None where neither does.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def read_file(path: Path, prefix: str) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte-order mark.

    Line ends become ``\\n``.

    Raises:
        UserError: the file cannot be read, or is no such text; the message begins with ``what``.
    """
    try:
        with open_regular(path) as file:
            content = file.read()
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        reason = "it holds zero bytes, as UTF-32 does and UTF-16 without a byte-order mark" if "\0" in text else ""
    except OSError as error:
        raise UserError(f"{prefix}: cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line, byte = 1 + error.object.count(b"\n", 0, error.start), error.object[error.start]
        reason = f"line {line} has the byte 0x{byte:02X}, which is not {error.encoding.upper()}"
    if content.startswith(b"PK\x03\x04"):
        reason = "it is a workbook (xlsx, ods) or another zip archive"
    if reason:
        raise UserError(f'{prefix}: cannot read {path}: {reason}; save it as UTF-8 text, in Excel as "CSV UTF-8"')
    return io.StringIO(text, newline=None).getvalue()


def read_bytes(
    folder: Path, name: str, data: str, due: Callable[[bytes, Path], int], header: int = 0
) -> tuple[bytes, Path]:
    """Read ``folder/name`` or ``folder/name.gz``, decompressed, and return the content and the path of the file.

    Args:
        due, header: limit of the decompressed size, see :func:`gunzip`; ``due`` is also given the path.

    Raises:
        UserError: a missing, unreadable or damaged file, or more content than is due.
    """
    path = find_file(folder, name)
    if path is None:
        raise UserError(f'data set "{data}": the file {folder / name} (or {name}.gz) is missing')
    try:
        with open_regular(path) as file:
            if path.suffix != ".gz":
                return file.read(), path
            return gunzip(file, lambda head: due(head, path), header), path
    except OSError as error:
        raise UserError(f'data set "{data}": cannot read {path}: {error.strerror or error}') from error
    except ValueError as error:
        raise UserError(f'data set "{data}": {path} is not a complete gzip file ({error}); fetch it again') from error


def gunzip(file: BinaryIO, due: Callable[[bytes], int], header: int) -> bytes:
    """Return the content of a gzip file (RFC 1952, one member or several), checked to its last byte.

    Decompression stops at the limit: otherwise a small file could fill the memory.

    Args:
        due: maps the first ``header`` bytes of the content to the most bytes that the content may have.  Not called
            where the content has fewer than ``header`` bytes.

    Raises:
        ValueError: the file is empty or cut off, a checksum or length is wrong, other bytes than zeros follow the end,
            or there is more content than is due.
    """
    try:
        with gzip.GzipFile(fileobj=file) as unzipped:
            content = unzipped.read(header)
            if len(content) == header:
                limit = min(due(content), MOST)
                content += unzipped.read(max(0, limit + 1 - header))
                if len(content) > limit:
                    raise ValueError(f"it holds more than the {limit:,} bytes that are due")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(str(error)) from None
    if not file.tell():
        raise ValueError("it is empty")
    return content
