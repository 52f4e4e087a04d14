"""Files that a plugin imports from its own folder, as parts of the plugin's identity.

They are found by the ``import`` statements in the source of the plugin, of its imports, and so on; nothing is executed,
and other ways to import (``importlib``) do not count.  Neither do installed packages, the standard library and fedkern,
even in the plugin's folder.

An identity is ``sha256:HEX`` of the plugin, followed by ``; PATH sha256:HEX`` for every neighbour, with the path
relative to the plugin's folder.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import all_suffixes
from pathlib import Path

from fedkern.usercode.code_identity import content_hash, read_content

_SEEN: dict[str, str] = {}  # identities of files that this process has run, by module, and of their imports
_PART = re.compile(r"(?:(?P<path>.+?) )??(?P<hash>sha256:[0-9a-f]{64})(?:; |$)", re.DOTALL)


@dataclass(frozen=True)
class CodeFile:
    """Current content of a file of code.

    Attributes:
        hashes: of the imported files in its folder by relative path, and its own under ``""``.
        modules: names of the modules that it imports from its folder.
    """

    source: bytes
    hashes: dict[str, str]
    modules: tuple[str, ...]

    @property
    def identity(self) -> str:
        return "; ".join(f"{path} {text}".lstrip() for path, text in self.hashes.items())


def read_code(file: Path, subject: str, source: bytes | None = None) -> CodeFile:
    """Read a file of code and its imports from its own folder, without executing anything.

    ``source`` replaces the file's content.
    """
    source = read_content(file, subject) if source is None else source
    neighbours = imported_modules(file, source)
    paths = sorted((path.relative_to(file.parent).as_posix(), path) for path in neighbours)
    hashes = {"": content_hash(source), **{name: content_hash(read_content(path)) for name, path in paths}}
    return CodeFile(source, hashes, tuple(dict.fromkeys(neighbours.values())))


def forget_changed(file: Path, code: CodeFile, module: str) -> None:
    """Unload a file's ``module``, and those beside it, if a file has changed since this process ran it."""
    hashes = {module: code.identity, **{str(file.parent / path): text for path, text in code.hashes.items() if path}}
    if any(_SEEN.get(name, text) != text for name, text in hashes.items()):
        for name in (module, *loaded_modules(file.parent, code.modules)):
            sys.modules.pop(name, None)
    _SEEN.update(hashes)


def parse_identity(text: str) -> dict[str, str]:
    """Return the hashes by relative path, the plugin's under ``""``, or {} if the text is no identity."""
    parts: dict[str, str] = {}
    at = 0
    while at < len(text):
        part = _PART.match(text, at)
        if part is None:
            return {}
        parts[part["path"] or ""], at = part["hash"], part.end()
    return parts if "" in parts else {}


def loaded_modules(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the modules that this process has loaded from the folder or below."""
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return [name for name, file in files.items() if file and Path(os.path.realpath(file)).is_relative_to(folder)]


def imported_modules(file: Path, source: bytes) -> dict[Path, str]:
    """Return modules by file, in the plugin's folder or below, that import statements lead to."""
    folder, foreign = file.parent, _foreign(file.parent)
    modules: dict[Path, str] = {}
    todo = [(file, source)]
    while todo:
        current, text = todo.pop()
        for name in _names(current, text, folder):
            for path in _files(folder.joinpath(*name.split("."))):
                if path in modules or path == file or any(path.is_relative_to(place) for place in foreign):
                    continue
                if path.is_file():
                    modules[path] = name
                    if path.suffix == ".py":
                        todo.append((path, read_content(path)))
    return modules


def _files(stem: Path) -> Iterator[Path]:
    for suffix in all_suffixes():
        yield stem.with_name(f"{stem.name}{suffix}")
        yield stem / f"__init__{suffix}"


def _foreign(folder: Path) -> list[Path]:
    """Return folders of installed code inside a folder: of an environment, or a checkout of fedkern."""
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [os.path.realpath(place) for place in (str(Path(__file__).parents[1]), *places) if place]
    return [Path(path) for path in folders if Path(path).is_relative_to(folder)]


def _names(file: Path, source: bytes, folder: Path) -> Iterator[str]:
    """Yield dotted names that a file may import, with their packages, as seen from the folder."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # reported when it is executed
        return
    package = file.parent.relative_to(folder).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            above = package[: max(0, len(package) - node.level + 1)] if node.level else ()
            base = [*above, *(node.module.split(".") if node.module else ())]
            yield from _with_parents(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def _with_parents(parts: list[str]) -> Iterator[str]:
    return (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
