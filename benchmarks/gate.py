"""Floors under speed-ups, and verdicts on new measurements.

``floors.toml`` holds, for one machine and the rows of shown.py that are quick enough, how many times as fast as a
baseline ours was in each of several processes, which differ in where their memory lies, and that baseline's
seconds.  ``pytest benchmarks --set-floors`` measures and writes them; run again, it adds a process.  ``--gate-short``
measures in the same way, and again in fresh processes where a row stays below :data:`FACTOR` of the highest ratio
seen; it fails where none of :data:`PROCESSES` reaches that.  A kernel that takes 30 % longer has at best 0.77 of the
highest, whatever the process.  A row of which fewer than :data:`OFTEN` of the processes saw enough is not held: sound
kernels would fail.

A measurement cannot tell, and the test is skipped, where other processes compute meanwhile, times scatter, or the
baseline is not as fast as it was: hosts of the same name differ, and so do their ratios.  So are all tests on
another kind of machine.
"""

import json
import os
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLOORS = Path(__file__).parent / "floors.toml"
FACTOR = 0.82
OFTEN = 0.9  # share of the processes in which a row that is held reached its floor
PROCESSES = 4  # that find a row too slow before it is: a sound kernel's are all unlucky once in 10,000 times at most
ATTEMPTS = 2  # measurements in each
PAUSE = 1.0  # seconds before a second attempt: neighbours on the host come and go
DRIFT = 0.15  # by which a baseline may leave the times that it took where the floor was seen
NOISY = 0.3  # scatter (interquartile range over median) above which times tell nothing
BUSY = 0.15  # share of the processors that others may take beside a measurement
LONGEST = 0.1  # seconds that a row's two baselines take at most, one call of each
STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Floor:
    """Earlier measurements of one row.

    Attributes:
        against: the baseline.
        ratios: its time over ours, process by process.
        seconds: its own time, process by process.
    """

    against: str
    ratios: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def lowest(self) -> float:
        """Return the lowest allowed ratio."""
        return FACTOR * max(self.ratios)

    @property
    def can_hold(self) -> bool:
        """Return whether sound kernels reach the floor so often that the gate can hold the row."""
        return sum(ratio >= self.lowest for ratio in self.ratios) >= OFTEN * len(self.ratios)

    def drift(self, seconds: float) -> float:
        """Return the share by which a baseline's time lies outside of the earlier ones."""
        low, high = min(self.seconds), max(self.seconds)
        return max(seconds / high - 1, 1 - seconds / low, 0.0)

    def after(self, earlier: "Floor | None") -> "Floor":
        """Return the measurements of earlier processes and this one."""
        if earlier is None or earlier.against != self.against:
            return self
        return Floor(self.against, earlier.ratios + self.ratios, earlier.seconds + self.seconds)


@dataclass
class Floors:
    """Contents of floors.toml: the machine of the floors, and the floors by pytest node."""

    machine: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Floor] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Verdict of a measurement: "pass", "skip" or "fail", with the reason."""

    outcome: str
    reason: str = ""


def write_floors(floors: Floors, path: Path = FLOORS) -> None:
    """Write floors.toml as a whole."""
    lines = ["# Times a baseline's time over ours, as pytest benchmarks --set-floors saw it.", "", "[machine]"]
    lines += [f"{fact} = {_text(value)}" for fact, value in floors.machine.items()]
    lines += ["", "[floors]"]
    for test, floor in sorted(floors.rows.items()):
        ratios, seconds = (", ".join(f"{value:.3g}" for value in seen) for seen in (floor.ratios, floor.seconds))
        against = _text(floor.against)
        lines.append(f"{_text(test)} = {{ against = {against}, ratios = [{ratios}], seconds = [{seconds}] }}")
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(path)


def _text(value: Any) -> str:
    """Return a string or number in TOML, which writes them as JSON does."""
    return json.dumps(value, ensure_ascii=False)


def read_floors(path: Path = FLOORS) -> Floors:
    """Read floors.toml, where a missing file holds no floors."""
    if not path.exists():
        return Floors()
    content = tomllib.loads(path.read_text())
    rows = {
        test: Floor(row["against"], tuple(row["ratios"]), tuple(row["seconds"]))
        for test, row in content["floors"].items()
    }
    return Floors(content["machine"], rows)


def usable_cpus() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Duel:
    """Measurement of ours beside the baseline.

    Attributes:
        ratios: the other's time over ours, pair by pair.
        seconds: the other's time.
        scatter: interquartile range over median of either's times, the larger one.
        busy: share of the processors that other processes took.
    """

    ratios: Sequence[float]
    seconds: float
    scatter: float = 0.0
    busy: float = 0.0

    @property
    def ratio(self) -> float:
        """Return the pairs' median."""
        return statistics.median(self.ratios)


def judge(floor: Floor, duel: Duel) -> Verdict:
    """Compare a measurement with its floor."""
    reached = duel.ratio >= floor.lowest
    seen = f"{duel.ratio:.3g}× {floor.against}, {'above' if reached else 'below'} {floor.lowest:.3g}×"
    if floor.drift(duel.seconds) > DRIFT:  # a baseline that is slow today lets a slow kernel pass
        return Verdict("skip", f"{seen}, but here {floor.against} is not as fast as where the floor was seen")
    if reached:
        return Verdict("pass")
    if duel.busy > BUSY:
        return Verdict("skip", f"{seen}, but others took {100 * duel.busy:.0f} % of the processors")
    if duel.scatter > NOISY:
        return Verdict("skip", f"{seen}, but times scatter by {100 * duel.scatter:.0f} %")
    return Verdict("fail", seen)


def joint(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict of several processes: a pass if one passes, and a failure if at least half of them fail."""
    for outcome, needed in (("pass", 1.0), ("fail", len(verdicts) / 2)):
        alike = [verdict for verdict in verdicts if verdict.outcome == outcome]
        if len(alike) >= needed:
            return alike[0]
    return next(verdict for verdict in verdicts if verdict.outcome == "skip")


class Others:
    """Meter of the share of the processors that other processes take."""

    def __init__(self) -> None:
        self._start = self._read_seconds()

    def share(self) -> float:
        """Return the share since this meter was made, 0 where the system does not tell."""
        busy, total, ours = (b - a for a, b in zip(self._start, self._read_seconds(), strict=True))
        return max(0.0, (busy - ours) / total) if total else 0.0

    @staticmethod
    def _read_seconds() -> tuple[float, float, float]:
        """Return busy and total seconds of all processors, and this process's own."""
        ours = sum(os.times()[:2])
        if not STAT.exists():
            return 0.0, 0.0, ours
        ticks = [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[1:9]]
        second = os.sysconf("SC_CLK_TCK")
        return (sum(ticks) - ticks[3] - ticks[4]) / second, sum(ticks) / second, ours
