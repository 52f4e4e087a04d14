"""Code that a user names: FILE.py:NAME, or MODULE:NAME."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedkern.errors import UserError, nearest
from fedkern.files import filesystem
from fedkern.usercode import identity
from fedkern.usercode.execution import module_name, run

FORMS = "FILE.py:NAME or MODULE:NAME"
INSTANCE = "module:"
"""Beginning of the name of a network that a script gives as a module, which no code can be named by."""


@dataclass(frozen=True)
class Named:
    """The name of a class or function in a Python file, by its absolute path, or in a module; the other one is ""."""

    name: str
    file: str = ""
    module: str = ""

    def __str__(self) -> str:
        return f"{self.file or self.module}:{self.name}"


def parse(text: str) -> Named | None:
    """The class or function that ``text`` names; None where the text has neither form."""
    place, _, name = text.rpartition(":")
    if not name.isidentifier() or text.startswith(INSTANCE):
        return None
    if place.endswith(".py"):
        return Named(name, file=filesystem.absolute(place))
    return Named(name, module=place) if all(part.isidentifier() for part in place.split(".")) else None


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


def trusts(trusted: Iterable[str], code: str) -> bool:
    """Whether the user has named code, in whatever way it spells the path."""
    return absolute(code) in {absolute(part) for part in trusted}


def untrusted(file: object, code: str, again: str) -> UserError:
    """The refusal of code that only a file of a run folder names; ``again`` says what the user is to give."""
    return UserError(
        f"{file} names code to run, {code}, and a run folder may come from anyone: where you trust that code, give "
        f"{again}."
    )


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
    source = identity.content(named.file, f"{what} {named}") if named.file else None
    try:
        module = run(named.module) if source is None else run(module_name(named.file, source), named.file, source)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise UserError(f"{what} {named} cannot be imported: {type(error).__name__}: {error}.") from None
    if source is None and (file := getattr(module, "__file__", None) or "").endswith(".py"):
        source = identity.content(file, f"{what} {named}")
    digest = None if source is None else hashlib.sha256(source).hexdigest()
    try:
        return getattr(module, named.name), digest
    except AttributeError:
        hint = nearest(named.name, [name for name in vars(module) if not name.startswith("_")])
        where = named.file or named.module
        raise UserError(f'{what} {named} cannot be imported: {where} has no "{named.name}".{hint}') from None
