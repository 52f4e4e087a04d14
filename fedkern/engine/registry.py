"""Registry of the parts and filters of runs by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fedkern.engine.parts.base import Part
from fedkern.engine.uploads.filters import Filter
from fedkern.usercode.docstrings import docstring

PARTS: dict[str, type[Part]] = {}
"""Classes of parts by name."""
FILTERS: dict[str, type[Filter]] = {}
"""Classes of filters by name."""

P = TypeVar("P", bound=type[Part])
F = TypeVar("F", bound=type[Filter])


def register_part(name: str) -> Callable[[P], P]:
    """Class decorator: registers a part of runs as ``name``, its key in checkpoints (see :meth:`Part.build`).

    Raises:
        ValueError: another part has the name.
        TypeError: the class is not derived from :class:`Part`, or has no docstring.
    """
    return lambda kind: _added(kind, name, "part", Part, PARTS)


def register_filter(name: str) -> Callable[[F], F]:
    """Class decorator: registers a filter of uploads as ``name``, its key in checkpoints (see :meth:`Filter.build`).

    Raises:
        ValueError: another filter has the name.
        TypeError: the class is not derived from :class:`Filter`, or has no docstring.
    """
    return lambda kind: _added(kind, name, "filter", Filter, FILTERS)


def _added(kind: Any, name: str, what: str, base: type, table: dict[str, Any]) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise TypeError(f'{what} "{name}": expected a class derived from fedkern.{base.__name__}, given {kind!r}')
    known = table.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f'{what} "{name}" is already registered by {known.__qualname__}')
    if not docstring(kind):
        raise TypeError(f"{kind.__qualname__} needs a docstring: its first line describes the {what} to the user")
    kind.name = name  # type: ignore[attr-defined]
    table[name] = kind
    return kind
