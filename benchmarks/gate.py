"""Floors under speed-ups, and what a new measurement says about them.

``floors.toml`` holds, for one machine and the rows of shown.py that are quick enough, how many times as fast as one
other contestant ours was, the lowest and the highest of several processes, which differ in where their memory lies.
``pytest benchmarks --set-floors`` measures and writes them; run again, it widens them.  ``--gate-short`` measures in
the same way and fails where the median of the pairs' ratios lies below :data:`FACTOR` of the lowest, in
:data:`ATTEMPTS` measurements in a row: a kernel that takes 30 % longer has 0.77 of its ratio.  So a row that processes
see :data:`STEADY` apart is not held: there 30 % would not show.  Where other processes compute meanwhile or times
scatter, a measurement cannot tell: the test is skipped.  So are all tests on another kind of machine.
"""

from __future__ import annotations

import json
import os
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLOORS = Path(__file__).parent / "floors.toml"
FACTOR = 0.9
STEADY = 0.87  # lowest over highest ratio of a row that is held: below 0.77 / FACTOR a slow kernel could pass
ATTEMPTS = 4
PAUSE = 1.0  # seconds before a second attempt, twice as many before the third: neighbours on the host come and go
NOISY = 0.3  # scatter (interquartile range over median) above which times tell nothing
BUSY = 0.15  # share of the processors that others may take beside a measurement
LONGEST = 0.1  # seconds that a row's two contestants take at most, one call of each
STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Floor:
    """What was seen of one row.

    Attributes:
        against: the contestant.
        ratio: its time over ours, in the process where that was least.
        highest: the same in the process where it was most.
    """

    against: str
    ratio: float
    highest: float

    @property
    def lowest(self) -> float:
        """The lowest allowed ratio."""
        return FACTOR * self.ratio

    @property
    def steady(self) -> bool:
        """Whether processes agree so well that the gate can hold the row."""
        return self.ratio >= STEADY * self.highest

    def seen(self, other: Floor | None) -> Floor:
        """What this and an earlier process saw of the row."""
        if other is None or other.against != self.against:
            return self
        return Floor(self.against, min(self.ratio, other.ratio), max(self.highest, other.highest))


@dataclass
class Floors:
    """All of floors.toml: the machine on which the floors were seen, and the floors by pytest node."""

    machine: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Floor] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a measurement says: "pass", "skip" or "fail", with the reason."""

    outcome: str
    reason: str = ""


def write_floors(floors: Floors, path: Path = FLOORS) -> None:
    """Writes floors.toml as a whole."""
    lines = ["# Times another contestant's time over ours, as pytest benchmarks --set-floors saw it.", "", "[machine]"]
    lines += [f"{fact} = {_text(value)}" for fact, value in floors.machine.items()]
    lines += ["", "[floors]"]
    for test, floor in sorted(floors.rows.items()):
        numbers = f"ratio = {floor.ratio:.3g}, highest = {floor.highest:.3g}"
        lines.append(f"{_text(test)} = {{ against = {_text(floor.against)}, {numbers} }}")
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(path)


def _text(value: Any) -> str:
    """A string or number in TOML, which writes them as JSON does."""
    return json.dumps(value, ensure_ascii=False)


def read_floors(path: Path = FLOORS) -> Floors:
    """Reads floors.toml; a missing file holds no floors."""
    if not path.exists():
        return Floors()
    content = tomllib.loads(path.read_text())
    return Floors(content["machine"], {test: Floor(**row) for test, row in content["floors"].items()})


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def judge(floor: Floor, ratios: Sequence[float], scatter: float, others: float = 0.0) -> Verdict:
    """Compares measured pairs with their floor.

    Args:
        ratios: other's time over our time, pair by pair.
        scatter: interquartile range over median of either's times, the larger one.
        others: share of the processors that other processes took.
    """
    if statistics.median(ratios) >= floor.lowest:
        return Verdict("pass")
    seen = f"{statistics.median(ratios):.3g}× {floor.against}, below {floor.lowest:.3g}×"
    if others > BUSY:
        return Verdict("skip", f"{seen}, but others took {100 * others:.0f} % of the processors")
    if scatter > NOISY:
        return Verdict("skip", f"{seen}, but times scatter by {100 * scatter:.0f} %")
    return Verdict("fail", seen)


class Others:
    """Which share of the processors other processes take."""

    def __init__(self) -> None:
        self._start = self._spent()

    def share(self) -> float:
        """Since this was made; 0 where the system does not tell."""
        busy, whole, own = (b - a for a, b in zip(self._start, self._spent(), strict=True))
        return max(0.0, (busy - own) / whole) if whole else 0.0

    @staticmethod
    def _spent() -> tuple[float, float, float]:
        """Busy and whole seconds of all processors, and this process's own."""
        own = sum(os.times()[:2])
        if not STAT.exists():
            return 0.0, 0.0, own
        ticks = [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[1:9]]
        second = os.sysconf("SC_CLK_TCK")
        return (sum(ticks) - ticks[3] - ticks[4]) / second, sum(ticks) / second, own
