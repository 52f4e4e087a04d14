"""Names of user-defined code: FILE.py:NAME, or MODULE:NAME."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkern.errors import UserError, first_of, suggest_name
from fedkern.files import filesystem
from fedkern.usercode import plugin_files
from fedkern.usercode.code_execution import module_name, run_module
from fedkern.usercode.code_identity import digest, identity_table, module_identity

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
            code = plugin_files.read_code(file, f"{subject} {named}")
            identity, name = code.identity, module_name(named.file, code.source)
            plugin_files.forget_changed(file, code, name)
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
