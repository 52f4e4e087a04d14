"""Finding and reading files of data sets, plain or gzip-compressed."""

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

MAX_CONTENT_BYTES = 1 << 32
"""Most bytes from a ``.gz`` file, whatever its header announces."""


def find_folder(root: str | Path | None, data: str, subfolders: Sequence[str], files: Sequence[str]) -> Path:
    """Return the first ``root/subfolder``, or ``root``, with any of ``files``, plain or ``.gz``.

    Subfolders come first: MNIST and Fashion-MNIST share file names, so a flat ``root`` is the weaker hint.
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
    """Return ``root`` as an existing folder, or raise UserError."""
    if root is None:
        raise UserError(
            f'data set "{data}" is read from files such as {example}: name their folder with --data-root DIR'
        )
    folder = expand(root)
    if not folder.is_dir():
        raise UserError(f'data set "{data}": the data root {folder} is not a folder')
    return folder


def find_file(folder: Path, name: str) -> Path | None:
    """Return ``folder/name`` or ``folder/name.gz``, or None."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def read_file(path: Path, prefix: str) -> str:
    """Return a text file, UTF-8 or UTF-16 with a byte-order mark, with line ends ``\\n``.

    UserError messages begin with ``prefix``.
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
    """Return a file's decompressed content and path, see :func:`gunzip` for ``due`` and ``header``."""
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
    """Return the content of a gzip file (RFC 1952, one or several members), checked to its last byte.

    Decompression stops at a limit, else a small file could fill the memory: ``due`` maps the first ``header`` bytes of
    the content to its largest size.
    """
    try:
        with gzip.GzipFile(fileobj=file) as unzipped:
            content = unzipped.read(header)
            if len(content) == header:
                limit = min(due(content), MAX_CONTENT_BYTES)
                content += unzipped.read(max(0, limit + 1 - header))
                if len(content) > limit:
                    raise ValueError(f"it holds more than the {limit:,} bytes that are due")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(str(error)) from None
    if not file.tell():
        raise ValueError("it is empty")
    return content
