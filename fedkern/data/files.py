"""Finding and reading the files of a data set: plain or gzip-compressed, with one clear sentence when one is wrong."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

from fedkern.errors import UserError
from fedkern.files import expand


def find_folder(root: str | Path | None, data: str, subfolders: Sequence[str], files: Sequence[str]) -> Path:
    """Returns the first of ``root/subfolder`` (then ``root`` itself) that holds any of ``files``, plain or ``.gz``.

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
    """Returns ``root`` as an existing folder, or says that ``data`` needs one because of files like ``example``."""
    if root is None:
        raise UserError(
            f'data set "{data}" is read from files such as {example}: name their folder with --data-root DIR'
        )
    folder = expand(root)
    if not folder.is_dir():
        raise UserError(f'data set "{data}": the data root {folder} is not a folder')
    return folder


def find_file(folder: Path, name: str) -> Path | None:
    """``folder/name`` or ``folder/name.gz``, whichever is there, the plain one first."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def read_bytes(folder: Path, name: str, data: str) -> tuple[bytes, Path]:
    """Reads ``folder/name`` or ``folder/name.gz``, decompressed, and tells which file it was.

    Raises:
        UserError: missing, unreadable or damaged file.
    """
    path = find_file(folder, name)
    if path is None:
        raise UserError(f'data set "{data}": the file {folder / name} (or {name}.gz) is missing')
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f'data set "{data}": cannot read {path}: {error.strerror or error}') from error
    if path.suffix != ".gz":
        return raw, path
    try:
        return gzip.decompress(raw), path
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f'data set "{data}": {path} is not a complete gzip file ({error}); fetch it again') from error
