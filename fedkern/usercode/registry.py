"""Registries of built-in and user-defined entries by name, and options of registered functions."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

Entry = TypeVar("Entry")

REGISTRIES: dict[str, Registry[Any]] = {}
"""All registries of the process, by kind."""


class Registry(dict[str, Entry]):
    """Entries of one kind by name.

    Args:
        kind: word for an entry in messages, such as ``"data set"``.
        entries: built-in ones.
        code: gives the class or function of an entry, or None for one that nobody may replace.
    """

    def __init__(
        self, kind: str, entries: Mapping[str, Entry] | None = None, code: Callable[[Entry], Any] = lambda entry: entry
    ) -> None:
        super().__init__(entries or {})
        self.kind, self._code = kind, code
        REGISTRIES[kind] = self

    def takes(self, name: str, code: object) -> bool:
        """Return whether a name is free, or holds the same class or function of a re-run cell or file."""
        return name not in self or _place(self._code(self[name])) == _place(code)

    def describe(self, name: str, code: object, otherwise: str = "") -> str:
        """Return the first line of the docstring of a class or function to be registered as ``name``.

        Raises:
            ValueError: another class or function has the name.
            TypeError: there is no docstring and no description ``otherwise``.
        """
        if not self.takes(name, code):
            holder = self._code(self[name])
            by = "" if holder is None else f" by {name_of(holder)}"
            raise ValueError(f'{self.kind} "{name}" is already registered{by}')
        description = read_docstring(code).partition("\n")[0].strip() or otherwise
        if not description:
            raise TypeError(f"{name_of(code)} needs a docstring: its first line describes the {self.kind} to the user")
        return description


def _place(code: object) -> tuple[str, str] | None:
    """Return file (or module, such as a notebook's) and name of a class or function."""
    if code is None:
        return None
    module = sys.modules.get(code.__module__)
    file = getattr(module, "__file__", None)
    return os.path.realpath(file) if file else code.__module__, name_of(code)


def name_of(code: object) -> str:
    return str(getattr(code, "__qualname__", type(code).__qualname__))


def read_docstring(thing: Any) -> str:
    """Return the docstring of a function or class, read from its source under ``-OO``, or ""."""
    if thing.__doc__ or sys.flags.optimize < 2:
        return inspect.cleandoc(thing.__doc__ or "")
    try:
        (defined,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
        return ast.get_docstring(defined) or ""  # type: ignore[arg-type]
    except (OSError, TypeError, ValueError, SyntaxError):  # no source to look for a docstring
        return str(thing.__name__)


def keyword_options(function: Callable[..., Any], exclusions: Collection[str]) -> dict[str, Any]:
    """Return the keyword parameters of a registered function with their defaults, without ``exclusions``."""
    options = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in exclusions:
            continue
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise TypeError(f"{function.__qualname__}: expected options as named parameters, given {parameter}")
        if parameter.default is parameter.empty:
            raise TypeError(f"{function.__qualname__}: expected a default for the option {name}, given none")
        options[name] = parameter.default
    return options
