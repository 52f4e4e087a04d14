"""Registry of the parts and filters of runs by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fedkern.engine.parts.base import Part
from fedkern.engine.uploads.encoders import Encoder
from fedkern.engine.uploads.filters import Filter
from fedkern.usercode.hooks import check_hooks
from fedkern.usercode.registry import Registry

PARTS: Registry[type[Part]] = Registry("part")
"""Classes of parts by name."""
FILTERS: Registry[type[Filter]] = Registry("filter")
"""Classes of filters by name."""

P = TypeVar("P", bound=type[Part])
F = TypeVar("F", bound=type[Filter])
K = TypeVar("K", bound=type)


def register_part(name: str) -> Callable[[P], P]:
    """Class decorator: registers a part of runs as ``name``, its key in checkpoints (see :meth:`Part.build`).

    Raises:
        ValueError: another part has the name.
        TypeError: the class is not derived from :class:`Part`, or has no docstring.
    """
    return lambda kind: _add(kind, name, Part, PARTS)


def register_filter(name: str) -> Callable[[F], F]:
    """Class decorator: registers a filter of uploads as ``name``, its key in checkpoints (see :meth:`Filter.build`).

    Raises:
        ValueError: another filter has the name.
        TypeError: the class is not derived from :class:`Filter`, or has no docstring.
    """
    return lambda kind: _add(kind, name, Filter, FILTERS)


def _add(kind: K, name: str, base: type, table: Registry[Any]) -> K:
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise TypeError(f'{table.kind} "{name}": expected a class derived from fedkern.{base.__name__}, given {kind!r}')
    check_hooks(kind, Encoder)  # a filter may be its own encoder
    table.describe(name, kind)
    kind.name = name  # type: ignore[attr-defined]
    table[name] = kind
    return kind
