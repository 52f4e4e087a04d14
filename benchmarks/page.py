"""A page of the documentation whose numbers are written from results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """What vouches for a page's numbers.

    Attributes:
        path: from the repository's root.
        tables: makes the lines of every generated section, by name.
        part: heading of the only section that is looked at; empty: the whole page.
    """

    path: str
    tables: Mapping[str, Callable[[], Sequence[str]]]
    part: str = ""
