"""Code that a user names: FILE.py:NAME, or python:MODULE:NAME."""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fedkern.errors import UserError, nearest
from fedkern.files import filesystem
from fedkern.files.inputs import open_regular

FORMS = "FILE.py:NAME or python:MODULE:NAME"
_PREFIX = "fedkern_file_"


@dataclass(frozen=True)
class Named:
    """The name of a class or function in a Python file, by its absolute path, or in a module; the other one is ""."""

    name: str
    file: str = ""
    module: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.name}" if self.file else f"python:{self.module}:{self.name}"


def parse(text: str) -> Named | None:
    """The class or function that ``text`` names; None where the text has neither form."""
    if text.startswith("python:"):
        module, _, name = text.removeprefix("python:").rpartition(":")
        return Named(name, module=module) if module and name else None
    file, _, name = text.rpartition(":")
    return Named(name, file=filesystem.absolute(file)) if file.endswith(".py") and name.isidentifier() else None


def absolute(text: str) -> str:
    """The same text with an absolute path; a text that names no file is returned unchanged."""
    named = parse(text)
    return text if named is None else str(named)


def short(text: str) -> str:
    """The name alone of code, for titles and names of files; a text that names none is returned unchanged."""
    named = parse(text)
    return text if named is None else named.name


def again(text: Any, stored: str, *others: Any) -> bool:
    """Whether ``text`` names the code that a run has stored, and nothing is given beside it: no other files or options.

    A run folder may not name code alone, so a user names the code of a run's own data again.
    """
    return isinstance(text, str) and parse(text) is not None and absolute(text) == stored and not any(others)


def load(named: Named, what: str) -> tuple[Any, str | None]:
    """Imports the module, or runs the file, and returns what it calls by that name.

    A file is run once for each content, as a module of its own; modules beside the file can be imported.

    Args:
        what: subject of the error messages, such as ``"the teacher"``.

    Returns:
        The object, and the SHA-256 of the file with its definition; None for a module that comes from no Python file.

    Raises:
        UserError: there is no such file, module or name, or the code raises an exception.
    """
    digest: str | None
    try:
        with hosted(named):
            module, digest = _run(named.file) if named.file else (importlib.import_module(named.module), None)
        if not named.file and (source := getattr(module, "__file__", None) or "").endswith(".py"):
            digest = _read(source)[1]
    except OSError as error:
        raise UserError(f"{what} {named} cannot be read: {error.strerror or error}.") from None
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise UserError(f"{what} {named} cannot be imported: {type(error).__name__}: {error}.") from None
    try:
        return getattr(module, named.name), digest
    except AttributeError:
        hint = nearest(named.name, [name for name in vars(module) if not name.startswith("_")])
        where = named.file or named.module
        raise UserError(f'{what} {named} cannot be imported: {where} has no "{named.name}".{hint}') from None


def home(what: Any) -> str:
    """The module of a class or function; for one from a file that has changed it is the same as before."""
    module = str(what.__module__)
    return module.rpartition("_")[0] if module.startswith(_PREFIX) else module


@contextmanager
def hosted(named: Named | None) -> Iterator[None]:
    """Context of users' code: it can import the modules beside its file, as a script can, and changes no mode.

    The modes of PyTorch and NumPy and the working folder are afterwards what they were: other code runs after it.
    """
    from fedkern.process.torch_modes import kept  # here, since the front page is printed without torch

    folder = str(Path(named.file).parent) if named is not None and named.file else ""
    given = not folder or folder in sys.path
    if not given:
        sys.path.append(folder)
    try:
        with kept(), chdir("."):
            yield
    finally:
        if not given and folder in sys.path:  # the code may have removed it
            sys.path.remove(folder)


def _read(path: str) -> tuple[bytes, str]:
    with open_regular(path) as file:
        source = file.read()
    return source, hashlib.sha256(source).hexdigest()


def _run(path: str) -> tuple[ModuleType, str]:
    source, digest = _read(path)
    place = hashlib.sha256(path.encode()).hexdigest()
    # In the name, so that a changed file is another module and two files of one name are two.
    name = f"{_PREFIX}{re.sub(r'[^0-9A-Za-z]', '_', Path(path).stem)}_{place[:8]}_{digest[:8]}"
    if name in sys.modules:
        return sys.modules[name], digest
    module = ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module, digest
