"""Registries by name, of fedkern's own entries and of those that users add, and what a registered function declares."""

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
        kind: what messages call an entry, such as ``"data set"``.
        entries: those of fedkern's own.
        code: gives the class or function that an entry was made of, or None for one that nobody may replace.
    """

    def __init__(
        self, kind: str, entries: Mapping[str, Entry] | None = None, code: Callable[[Entry], Any] = lambda entry: entry
    ) -> None:
        super().__init__(entries or {})
        self.kind, self._code = kind, code
        REGISTRIES[kind] = self

    def takes(self, name: str, code: object) -> bool:
        """Whether a class or function can have a name: it is free, or a notebook's cell or a file is run again."""
        return name not in self or _place(self._code(self[name])) == _place(code)

    def describe(self, name: str, code: object, otherwise: str = "") -> str:
        """Return the first line of the docstring of a class or function that is to be registered as ``name``.

        Args:
            otherwise: the description where there is no docstring.

        Raises:
            ValueError: another class or function has the name.
            TypeError: there is no description.
        """
        if not self.takes(name, code):
            holder = self._code(self[name])
            by = "" if holder is None else f" by {name_of(holder)}"
            raise ValueError(f'{self.kind} "{name}" is already registered{by}')
        description = docstring(code).partition("\n")[0].strip() or otherwise
        if not description:
            raise TypeError(f"{name_of(code)} needs a docstring: its first line describes the {self.kind} to the user")
        return description


def _place(code: object) -> tuple[str, str] | None:
    """File and name of a class or function.

    Its module's name where that has no file, as a notebook's.
    """
    if code is None:
        return None
    module = sys.modules.get(code.__module__)
    file = getattr(module, "__file__", None)
    return os.path.realpath(file) if file else code.__module__, name_of(code)


def name_of(code: object) -> str:
    """Return the qualified name of a class or function, or that of an object's class."""
    return str(getattr(code, "__qualname__", type(code).__qualname__))


def docstring(thing: Any) -> str:
    """Return the docstring of a function or class, read from its source under ``-OO``.

    Empty where there is none.
    """
    if thing.__doc__ or sys.flags.optimize < 2:
        return inspect.cleandoc(thing.__doc__ or "")
    try:
        (defined,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
        return ast.get_docstring(defined) or ""  # type: ignore[arg-type]
    except (OSError, TypeError, ValueError, SyntaxError):  # no source: nobody can say whether there was one
        return str(thing.__name__)


def keyword_options(function: Callable[..., Any], exclusions: Collection[str]) -> dict[str, Any]:
    """Return the keyword parameters of a registered function with their defaults.

    fedkern's own (``exclusions``) are left out.

    Raises:
        TypeError: a parameter has no default, or the function takes any keywords or any further arguments.
    """
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
