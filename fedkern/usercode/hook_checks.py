"""Checks of user-defined classes for misspelt hooks, which would never be called."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any, TypeVar

from fedkern.errors import UserError, suggest_name
from fedkern.usercode.registry import Registry

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
        if (
            name.startswith("_")
            or name in foreign
            or any(name in names for owner, _, names in members if owner != name)
        ):
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
