"""A page of the documentation whose numbers are written from results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.studies.study import RESULTS


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


def by_seed(row: Mapping[str, Any]) -> dict[int, float]:
    """A figure by seed, of a row of ``reproduce --json``; empty where it is not played."""
    return {
        int(seed): float(value) for seed, _, value in (each.partition("=") for each in row.get("values", "").split())
    }


def decimal(value: float, digits: int, sign: str = "") -> str:
    """A difference with so many digits; what rounds to nothing is not negative.  ``sign`` "+": above 0 too."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")


@cache
def load(name: str, folder: Path = RESULTS) -> Mapping[str, Any]:
    """The results ``<name>.json``."""
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content
