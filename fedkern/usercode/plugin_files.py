"""Files that a plugin imports from its own folder, which belong to the plugin's identity.

They are found in the source, which is not executed: the ``import`` statements of the plugin, of what it imports, and so
on, also those inside functions.  What a plugin imports in another way (``importlib``, a path of its own) is found among
the modules that its execution has loaded.  Installed packages, the standard library and fedkern do not count, even if
they lie in the plugin's folder.

An identity is ``sha256:HEX`` of the plugin, followed by ``; PATH sha256:HEX`` for every neighbour, with the path
relative to the plugin's folder.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.machinery import all_suffixes
from pathlib import Path, PurePosixPath

from fedkern.errors import UserError
from fedkern.usercode.identity import INSTALLED, content, content_hash

_PART = re.compile(r"(?:(?P<path>.+?) )??(?P<hash>sha256:[0-9a-f]{64})(?:; |$)", re.DOTALL)


def identity(file: Path, source: bytes, neighbours: Iterable[Path]) -> str:
    """The identity of a plugin, whose path is absolute, with ``neighbours``, files in its folder or below.

    Raises:
        UserError: a neighbour cannot be read.
    """
    parts = sorted((path.relative_to(file.parent).as_posix(), path) for path in {*neighbours} - {file})
    return "; ".join([content_hash(source), *(f"{name} {content_hash(content(path))}" for name, path in parts)])


def read_code(file: Path, what: str) -> tuple[bytes, dict[Path, str], str]:
    """Return content, neighbours with their modules, and identity of a file of code.

    Raises:
        UserError: the file, which the error calls ``what``, or a neighbour cannot be read.
    """
    source = content(file, what)
    neighbours = imported(file, source)
    return source, neighbours, identity(file, source, neighbours)


def parsed(text: str) -> dict[str, str]:
    """Hashes by relative path, that of the plugin under ``""``; empty where the text is no identity of a file."""
    parts: dict[str, str] = {}
    at = 0
    while at < len(text):
        part = _PART.match(text, at)
        if part is None:
            return {}
        parts[part["path"] or ""], at = part["hash"], part.end()
    return parts if "" in parts else {}


def current(file: Path, source: bytes, stored: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of a plugin's files now, by relative path, without executing anything.

    These are the files of a stored identity, those that the plugin imports, and those that Python may load in their
    place.  A file that cannot be read, or that lies outside the plugin's folder, is left out.
    """
    found = [*imported(file, source), *in_the_place_of(file.parent, stored)]
    hashes = {}
    for name in {*stored, *(path.relative_to(file.parent).as_posix() for path in found)}:
        path = PurePosixPath(name)
        if not path.is_absolute() and ".." not in path.parts:
            with suppress(UserError):
                hashes[name] = content_hash(content(file.parent / path) if name else source)
    return hashes


def loaded(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """The files in the folder or below, by name, of modules that this process has loaded."""
    files: dict[str, Path] = {}
    foreign = _foreign(folder)
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        if isinstance(file, str):
            path = Path(os.path.realpath(Path(file).parent), Path(file).name)  # a file may be a link to another folder
            if _counts(path, folder, foreign) and path.is_file():
                files[name] = path
    return files


def imported(file: Path, source: bytes) -> dict[Path, str]:
    """Modules by file, in the plugin's folder or below, that import statements lead to, from one file to the next.

    Raises:
        UserError: a file cannot be read.
    """
    folder, foreign = file.parent, _foreign(file.parent)
    modules: dict[Path, str] = {}
    todo = [(file, source)]
    while todo:
        current, text = todo.pop()
        for name in _names(current, text, folder):
            for path in _files(folder.joinpath(*name.split("."))):
                if path not in modules and path != file and _counts(path, folder, foreign) and path.is_file():
                    modules[path] = name
                    if path.suffix == ".py":
                        todo.append((path, content(path)))
    return modules


def in_the_place_of(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Files that Python may load instead of others, such as a package or an extension beside a module of its name."""
    for name in names:
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts:
            continue
        ending = next((suffix for suffix in sorted(all_suffixes(), key=len, reverse=True) if name.endswith(suffix)), "")
        stem = folder / name.removesuffix(ending)
        stem = stem.parent if stem.name == "__init__" else stem
        yield from (path for path in _files(stem) if stem != folder and path.is_file())


def _files(stem: Path) -> Iterator[Path]:
    """The files that the import of a module may load, by its path without ending."""
    for suffix in all_suffixes():
        yield stem.with_name(f"{stem.name}{suffix}")
        yield stem / f"__init__{suffix}"


def _foreign(folder: Path) -> list[Path]:
    """Folders of installed code that lie in a folder: an environment may, or a checkout of fedkern."""
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [os.path.realpath(place) for place in (str(Path(__file__).parents[1]), *places) if place]
    return [Path(path) for path in folders if Path(path).is_relative_to(folder)]


def _counts(path: Path, folder: Path, foreign: Iterable[Path]) -> bool:
    if not path.is_relative_to(folder) or any(path.is_relative_to(place) for place in foreign):
        return False
    return not any(part in INSTALLED for part in path.relative_to(folder).parts)


def _names(file: Path, source: bytes, folder: Path) -> Iterator[str]:
    """Dotted names that a file may import, with the packages above them, as seen from the folder."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # its execution says so
        return
    package = file.parent.relative_to(folder).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                yield from _with_parents(each.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            above = package[: max(0, len(package) - node.level + 1)] if node.level else ()
            base = [*above, *(node.module.split(".") if node.module else ())]
            yield from _with_parents(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def _with_parents(parts: list[str]) -> Iterator[str]:
    return (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
