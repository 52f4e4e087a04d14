"""User-defined code by name, FILE.py:NAME or MODULE:NAME, the files that it imports, and its execution.

Files are found by the ``import`` statements in the source of a plugin, of its imports, and so on. Nothing is executed,
and other ways to import (``importlib``) do not count. Neither do installed packages, the standard library and fedkern,
even in the plugin's folder.

An identity is ``sha256:HEX`` of the plugin, followed by ``; PATH sha256:HEX`` for every neighbour, with the path
relative to the plugin's folder.
"""

import ast
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import all_suffixes
from pathlib import Path
from types import ModuleType
from typing import Any

from fedkern.errors import RAISED, UserError, describe_error, error_origin, first_of, suggest_name, user_message
from fedkern.files import filesystem
from fedkern.usercode.code_identity import content_hash, digest, identity_table, module_identity, read_content

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
    folder = file.parent
    # Installed code may stand inside the folder: an environment, or a checkout of fedkern.
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [Path(os.path.realpath(place)) for place in (str(Path(__file__).parents[1]), *places) if place]
    foreign = [path for path in folders if path.is_relative_to(folder)]
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


@contextmanager
def host_code(file: str = "") -> Iterator[None]:
    """Let code import modules beside its ``file``, and restore modes and the working folder afterwards."""
    from fedkern.process.torch_modes import keep_modes  # the command line's front page does without torch

    folder = str(Path(file).parent) if file else ""
    is_added = bool(folder) and folder not in sys.path
    if is_added:
        sys.path.append(folder)
    try:
        with keep_modes():
            yield
    finally:
        if is_added and folder in sys.path:  # the code may have removed it
            sys.path.remove(folder)


@contextmanager
def explain_errors(name: str, code: object, tensors: Sequence[object] = ()) -> Iterator[None]:
    """Name an exception in the user's function, class or object, with file, line and what tensors it was given."""
    try:
        yield
    except MemoryError:
        raise
    except RAISED as error:  # the user's own code may raise anything
        if user_message(error) is not None:  # a sentence for the user
            raise
        owner = code if inspect.isroutine(code) else type(code)
        forms = ((getattr(part, "dtype", ""), [*getattr(part, "shape", ())]) for part in tensors)
        given = [f"{dtype} {shape}".removeprefix("torch.") for dtype, shape in forms if dtype]
        on = " on " * bool(given) + " and ".join(given)
        raise UserError(f"{name} fails{on} ({describe_error(error)}){error_origin(error, owner)}.") from error


def module_name(file: str, source: bytes) -> str:
    """Return the name of a file with a content in ``sys.modules``, the same in every process."""
    digits = (hashlib.sha256(text).hexdigest()[:8] for text in (file.encode(), source))
    return "_".join(("fedkern_file", re.sub(r"[^0-9A-Za-z]", "_", Path(file).stem), *digits))


def run_module(module: str, file: str = "", source: bytes = b"") -> ModuleType:
    """Import a module, or execute ``source``, perhaps an older content of the file, once under the module's name.

    Raises:
        Exception, SystemExit: raised by the code.
    """
    with host_code(file):
        if not file or module in sys.modules:
            return importlib.import_module(module)
        sys.modules[module] = executed = ModuleType(module)  # dataclasses and pickle look there
        executed.__file__ = file
        importlib.invalidate_caches()  # files beside it may be new
        try:
            exec(compile(source, file, "exec", dont_inherit=True), executed.__dict__)
        except BaseException:
            sys.modules.pop(module, None)
            raise
        return executed


FORMS = "FILE.py:NAME or MODULE:NAME"
INSTANCE = "module:"
"""Beginning of the name of a network that a script gives as a module, impossible for code."""


@dataclass(frozen=True)
class Named:
    """Name of a class or function in a Python file (absolute path) or in a module."""

    name: str
    file: str = ""
    module: str = ""

    def __str__(self) -> str:
        return f"{self.file or self.module}:{self.name}"


def parse(text: str) -> Named | None:
    """Return the class or function that ``text`` names, or None."""
    place, _, name = text.rpartition(":")
    if not name.isidentifier() or text.startswith(INSTANCE):
        return None
    if place.endswith(".py"):
        return Named(name, file=filesystem.absolute(place))
    return Named(name, module=place) if all(part.isidentifier() for part in place.split(".")) else None


def absolute(text: str) -> str:
    location = parse(text)
    return text if location is None else str(location)


def short_name(text: str) -> str:
    """Return the name of code alone, for titles and names of files, and any other text unchanged."""
    location = parse(text)
    return text if location is None else location.name


def names_stored_code(text: object, stored: str, *additions: Any) -> bool:
    """Return whether ``text`` names the stored code of a run, without other files or options.

    A run folder may not name code alone, so a user has to.
    """
    return isinstance(text, str) and parse(text) is not None and absolute(text) == stored and not any(additions)


def trusts(trusted: Iterable[str], code: str) -> bool:
    """Return whether the user has named code, with any spelling of the path."""
    return absolute(code) in {absolute(part) for part in trusted}


def refuse_untrusted(file: object, code: str, again: str, flag: str) -> UserError:
    """Return the error for code that only a file of a run folder names, and the user has to give ``again``."""
    name = code.removeprefix("the plugin ")
    return UserError(
        f"{file} names code to run, {code}, and a run folder may come from anyone: where you trust that code, give "
        f"{again}, {flag} (in Python {trust(name)})."
    )


def trust(name: str) -> str:
    """Return the words by which Python trusts code of a stored run."""
    return f"trusted=[{json.dumps(name)}] to fedkern.load"


def refuse_changed(subject: str, out: object, differences: Sequence[str], again: str) -> UserError:
    """Return the error for untrusted code that has changed since the run in ``out`` began."""
    differ = f" ({first_of(differences, 3)})" if differences else ""
    return UserError(
        f"{subject} has changed since the run in {out} began{differ}: put back the former one, or give {again} to go "
        "on with the changed one, whose bits are not those of an uninterrupted run."
    )


def warn_of_change(code: str) -> str:
    return (
        f"The run goes on with {code} as it is now, not as the run was started with: its bits may differ from an "
        "uninterrupted one."
    )


def load(named: Named, subject: str) -> tuple[Any, str]:
    """Import the module, or run the file, and return the named object.

    A file is run once for each identity, as a module of its own; modules beside the file can be imported.

    Args:
        named: name of the code.
        subject: subject of the error messages, such as ``"the teacher"``.

    Returns:
        The object, and the identity of its file with all imports from the file's folder, or of its module.

    Raises:
        UserError: there is no such file, module or name, or the code raises an exception.
    """
    try:
        if named.file:
            file = Path(os.path.realpath(named.file))
            code = read_code(file, f"{subject} {named}")
            identity, name = code.identity, module_name(named.file, code.source)
            forget_changed(file, code, name)
            module = run_module(name, named.file, code.source)
        else:
            module = run_module(named.module)
            # os.path has another name in its spec, as has __main__ of python -m.  A running notebook has no spec.
            spec = getattr(module, "__spec__", None)
            thing = getattr(module, named.name, None)
            identity = digest(identity_table({named.name: thing})) if spec is None else module_identity(spec.name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise UserError(f"{subject} {named} cannot be imported: {type(error).__name__}: {error}.") from None
    try:
        return getattr(module, named.name), identity
    except AttributeError:
        hint = suggest_name(named.name, [name for name in vars(module) if not name.startswith("_")])
        place = named.file or named.module
        raise UserError(f'{subject} {named} cannot be imported: {place} has no "{named.name}".{hint}') from None
