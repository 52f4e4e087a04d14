"""Execution of users' code: a file as a module of its own, and what the code cannot change of the process."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fedkern.errors import RAISED, UserError, described, origin, told


@contextmanager
def hosted(file: str = "") -> Iterator[None]:
    """Context of users' code: it can import the modules beside its ``file``, as a script can, and changes no mode.

    The modes of PyTorch and NumPy and the working folder are afterwards what they were: other code runs after it.
    """
    from fedkern.process.torch_modes import kept  # here, since the front page is printed without torch

    folder = str(Path(file).parent) if file else ""
    added = bool(folder) and folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        with kept(), chdir("."):
            yield
    finally:
        if added and folder in sys.path:  # the code may have removed it
            sys.path.remove(folder)


@contextmanager
def explained(name: str, code: Any) -> Iterator[None]:
    """Context in which an exception of the user's function, class or object is named with its file and line."""
    try:
        yield
    except MemoryError:
        raise
    except RAISED as error:  # the user's own code may raise anything
        if told(error) is not None:  # a sentence for the user
            raise
        where = code if inspect.isroutine(code) else type(code)
        raise UserError(f"{name} fails ({described(error)}){origin(error, where)}.") from error


def module_name(what: str, file: str) -> str:
    """A name in ``sys.modules`` for a file that is executed, the same in every process."""
    return f"fedkern_{what}_{re.sub(r'[^0-9A-Za-z]', '_', Path(file).stem)}_{_digits(file.encode())}"


def changing_name(what: str, file: str, source: bytes) -> str:
    """As :func:`module_name`, another one for every content of the file."""
    return f"{module_name(what, file)}_{_digits(source)}"


def _digits(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def execute(file: str, source: bytes, name: str) -> ModuleType:
    """Executes a file's content, as it was hashed and whatever the file holds by now, as the module ``name``."""
    module = ModuleType(name)
    module.__file__ = file
    sys.modules[name] = module  # dataclasses and pickle look there
    importlib.invalidate_caches()  # files beside it may be new
    try:
        exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module
