"""Registries of built-in and user-defined entries by name, options of registered functions, and misspelt hooks."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any, TypeVar

from fedkern.errors import UserError, suggest_name

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
    file = getattr(sys.modules.get(code.__module__), "__file__", None)
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


Kind = TypeVar("Kind", bound=type)

ALIKE, ALIKE_EVENTS = 0.8, 0.5
"""Least similarity of a name to a hook, and of a name that shares a word with events (``on_...``)."""


def check_hooks(kind: type, protocol: type = object) -> None:
    """Raise UserError for a user-defined class with an unread name that is nearly a hook's.

    Names that begin with "_" and names from bases outside of fedkern pass, and those of ``protocol``.
    """
    shipped = [part for part in kind.__mro__ if part.__module__.partition(".")[0] == "fedkern"]
    if not shipped:
        return
    base = shipped[0]
    classes = [part for part in kind.__mro__ if part not in shipped and issubclass(part, base)]
    hooks = [name for name in dir(base) if not name.startswith("_")]
    foreign = {name for part in kind.__mro__ if part not in classes for name in vars(part)} | {*dir(protocol)}
    members = [(name, value, _names_in(value)) for part in classes for name, value in vars(part).items()]
    words = {"begin"}.union(*(hook.split("_")[1:] for hook in hooks if hook.startswith("on_")))
    for name, value, _ in members:
        is_used = any(name in names for owner, _, names in members if owner != name)
        if name.startswith("_") or name in foreign or is_used:
            continue
        is_event = name.startswith("on_") and not words.isdisjoint(name.split("_"))
        similar = [hook for hook in hooks if callable(value) == callable(getattr(base, hook))]
        if not is_event:  # a longer name, such as losses or evaluate_all, is a helper's
            similar = [hook for hook in similar if not name.startswith(hook) or len(name) == len(hook) + 1]
        if hint := suggest_name(name, similar, ALIKE_EVENTS if is_event else ALIKE):
            raise UserError(
                f'{kind.__name__} has "{name}", which nothing calls.{hint} Begin a name of your own with "_".'
            )


def _names_in(function: object) -> set[str]:
    names: set[str] = set()
    waiting: list[Any] = [function]
    while waiting:
        value = waiting.pop()
        if isinstance(value, CodeType):
            names |= {*value.co_names, *(text for text in value.co_consts if isinstance(text, str))}
            waiting += value.co_consts
        elif isinstance(value, FunctionType):
            waiting += [value.__code__, getattr(value, "__wrapped__", None)]
        elif isinstance(value, (staticmethod, classmethod)):
            waiting.append(value.__func__)
        elif isinstance(value, property):
            waiting += [value.fget, value.fset]
        elif isinstance(value, cached_property):
            waiting.append(value.func)
    return names


def register_class(table: Registry[Any], name: str, base: type, protocol: type = object) -> Callable[[Kind], Kind]:
    """Return a decorator that registers a class derived from ``base`` as ``name``, its attribute from then on.

    Raises:
        ValueError: another class has the name.
        TypeError: the class is not derived from ``base``, or has no docstring.
    """

    def register(kind: Kind) -> Kind:
        if not (isinstance(kind, type) and issubclass(kind, base)):
            due = f"a class derived from fedkern.{base.__name__}"
            raise TypeError(f'{table.kind} "{name}": expected {due}, given {kind!r}')
        check_hooks(kind, protocol)
        table.describe(name, kind)
        kind.name = name  # type: ignore[attr-defined]
        table[name] = kind
        return kind

    return register
