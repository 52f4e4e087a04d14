"""Execution of user-defined code: a file as a module, and protection of the process's state."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from fedkern.errors import RAISED, UserError, describe_error, error_origin, user_message


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
def explain_errors(name: str, code: object) -> Iterator[None]:
    """Name an exception in the user's function, class or object with file and line."""
    try:
        yield
    except MemoryError:
        raise
    except RAISED as error:  # the user's own code may raise anything
        if user_message(error) is not None:  # a sentence for the user
            raise
        owner = code if inspect.isroutine(code) else type(code)
        raise UserError(f"{name} fails ({describe_error(error)}){error_origin(error, owner)}.") from error


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
