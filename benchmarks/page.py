"""Page of the documentation whose numbers are written from results."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

STUDIES = Path(__file__).parent / "studies"
RESULTS = STUDIES / "results"
"""Results of the studies: NAME.json holds those of the cells in STUDIES/NAME.toml (`benchmarks.studies.run`)."""


@dataclass(frozen=True)
class Page:
    """Sources of a page's numbers.

    Attributes:
        path: from the repository's root.
        tables: makes the lines of every generated section, by name.
        part: heading of the only section that is looked at; empty: the whole page.
    """

    path: str
    tables: Mapping[str, Callable[[], Sequence[str]]]
    part: str = ""


def by_seed(row: Mapping[str, Any]) -> dict[int, float]:
    """Return a cell's figure by seed, empty where it is not played."""
    return {
        int(seed): float(value) for seed, _, value in (entry.partition("=") for entry in row.get("values", "").split())
    }


def decimal(value: float, digits: int, sign: str = "") -> str:
    """Return a difference with so many digits, without a minus sign if rounded to nothing.

    ``sign`` "+": a plus sign above 0.
    """
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")


@cache
def load(name: str, folder: Path = RESULTS) -> Mapping[str, Any]:
    """Return the results ``<name>.json``."""
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


def read_rows(study: str) -> dict[str, Mapping[str, Any]]:
    """Return the rows of a study's results by the names of their cells."""
    return {row["name"]: row for row in load(study)["rows"]}


def spread(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """Return ``mean ± standard deviation`` of fractions, in percent, or a single value alone."""
    centre = f"{scale * mean(values):.{digits}f}"
    return f"{centre} ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else centre


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
