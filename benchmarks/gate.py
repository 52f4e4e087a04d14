"""Floors under recorded speed-ups, and what a new measurement says about them.

``floors.toml`` holds, for every recorded row that was measured without load and every contestant whose times and ours
scattered by no more than :data:`NOISY`, :data:`FACTOR` times the observed ratio; ``python -m benchmarks.report
--floors`` writes it.  A run with ``--gate`` fails where the median of the pairs' ratios lies below the floor with 95 %
certainty, and does so in two measurements in a row.  ``--gate-short`` allows :data:`SHORT_SLACK` of the floor, 0.68 of
what was recorded, and four measurements.  Where the row's floors are of other machines, or the times of a contestant
that seems too fast or ours scatter by more than :data:`NOISY`, the measurement cannot tell: the test is skipped.

Whole runs, which take minutes, have floors too, :data:`FACTOR` times the ratios in ``results/methods_<cpu>.json``.
``python -m benchmarks.bench_methods --gate`` measures them, or ``pytest benchmarks/bench_methods.py -m slow --gate``.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tomllib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLOORS = Path(__file__).parent / "floors.toml"
# What of a machine moves ratios: comparisons.IDENTITY and comparisons.CHIP.
MOVES = (
    *("cpu", "cores", "isa", "gpu", "backend", "torch"),
    *("family", "model", "stepping", "implementer", "part", "l2", "l3"),
)
FACTOR = 0.85
NOISY = 0.3  # scatter (interquartile range over median) above which times tell nothing
SHORT_SECONDS = 5e-3  # the short gate's rows take at most this long, one call of every contestant together: beyond it,
# how much memory the machine has at hand decides
MEDIUM_SECONDS = 3e-3  # the same of an operator's second row
SHORT_SLACK = 0.8  # on the short gate's floors: it runs where others compute


def slow(contestant: str) -> bool:
    """Whether the short gate leaves a contestant out: seconds of compilation for milliseconds of running."""
    return contestant.startswith("compile")


def noisy(row: Any, contestant: str) -> bool:
    """Whether a row's times, the contestant's or ours, scatter so much that their ratio tells nothing."""
    return max(row.scatter[contestant], row.scatter[row.ours]) > NOISY


@dataclass(frozen=True)
class Floor:
    """The floors of one row on one machine.

    Attributes:
        machine: the name in floors.toml of where they were observed.
        against: lowest allowed ratio, by contestant.
        test: pytest node that measures it, relative to benchmarks/.
        short: whether the short gate includes it.
    """

    machine: str
    group: str
    case: str
    device: str
    threads: int
    loaded: bool
    test: str
    short: bool
    against: dict[str, float]

    @property
    def key(self) -> tuple[str, str, str, int, bool]:
        return self.group, self.case, self.device, self.threads, self.loaded


@dataclass
class Floors:
    """All of floors.toml: the floors, and by name the machines on which they were observed."""

    rows: list[Floor] = field(default_factory=list)
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, key: tuple[str, str, str, int, bool], here: Collection[str]) -> Floor | None:
        """The row's floor on this machine, whose names are ``here``; of several that of whom most is known."""
        found = [row for row in self.rows if row.key == key and row.machine in here]
        return max(found, key=lambda row: len(self.machines.get(row.machine, {})), default=None)

    def machines_of(self, key: tuple[str, str, str, int, bool]) -> list[str]:
        """The names of the machines on which the row has a floor."""
        return [row.machine for row in self.rows if row.key == key]

    def short_tests(self, device: str, here: Collection[str]) -> set[str]:
        """The short gate's tests on this machine, whose names are ``here``.

        Of an operator without floors of this machine they are the other machines': skipping them tells so.
        """
        rows = [row for row in self.rows if row.device == device]
        held = {row.group for row in rows if row.machine in here}
        return {row.test for row in rows if row.short and (row.machine in here or row.group not in held)}

    def add_machine(self, slug: str, machine: dict[str, Any]) -> str:
        """The machine's name: its slug, with a number where a machine that differs has that."""
        facts = {fact: machine[fact] for fact in MOVES if fact in machine}
        name, number = slug, 1
        while self.machines.setdefault(name, facts) != facts:
            number += 1
            name = f"{slug}-{number}"
        return name


@dataclass(frozen=True)
class Verdict:
    """What a measurement says: "pass", "skip" or "fail", with the reason."""

    outcome: str
    reason: str = ""


def make_floors(recorded: Iterable[tuple[str, dict[str, Any], Sequence[Any]]]) -> Floors:
    """Floors under the recorded rows, given as (slug, machine, comparisons) per results file.

    Rows measured beside a spinning process, contestants whose times scattered and contestants shown beside get none.
    The short gate takes of every operator, on every machine, the quickest row on one thread, if that is within
    :data:`SHORT_SECONDS`, and the longest one within :data:`MEDIUM_SECONDS`.
    """
    floors = Floors()
    for slug, machine, rows in recorded:
        kept = []
        for row in rows:
            steady = {n: r for n, r in row.speedup.items() if not noisy(row, n) and n not in row.beside}
            if not row.loaded and steady and row.test:
                kept.append((row, {name: round(FACTOR * ratio, 3) for name, ratio in steady.items()}))
        if not kept:
            continue
        name = floors.add_machine(slug, machine)
        chosen = _short([row for row, against in kept if not all(map(slow, against))])
        for row, against in kept:
            short = any(row is one for one in chosen)
            floors.rows.append(
                Floor(name, row.group, row.case, row.device, row.threads, row.loaded, row.test, short, against)
            )
    return floors


def _short(rows: Sequence[Any]) -> list[Any]:
    def cost(row: Any) -> float:
        return sum(seconds for name, seconds in row.seconds.items() if not slow(name))

    single = sorted((row for row in rows if row.threads == 1 and cost(row) <= SHORT_SECONDS), key=cost)
    return single[:1] + [row for row in single[1:] if cost(row) <= MEDIUM_SECONDS][-1:]


def write_floors(floors: Floors, path: Path = FLOORS) -> None:
    """Writes floors.toml as a whole."""
    lines = [
        f"# Lowest allowed speed-ups, {FACTOR:g} of the recorded: written by python -m benchmarks.report --floors.",
        "# The speed-ups that the project promises are in the bench files.",
    ]
    for name, machine in floors.machines.items():
        lines += ["", "[[machine]]", f"name = {_text(name)}"]
        lines += [f"{fact} = {_text(value)}" for fact, value in machine.items()]
    for row in floors.rows:
        lines += ["", "[[floor]]"]
        for name in ("machine", "group", "case", "device", "threads", "loaded", "test", "short"):
            lines.append(f"{name} = {_text(getattr(row, name))}")
        against = ", ".join(f"{_text(name)} = {ratio:g}" for name, ratio in row.against.items())
        lines.append(f"against = {{ {against} }}")
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(path)


def _text(value: Any) -> str:
    """A string, number or truth value in TOML, which writes them as JSON does."""
    return json.dumps(value, ensure_ascii=False)


def read_floors(path: Path = FLOORS) -> Floors:
    """Reads floors.toml; a missing file holds no floors."""
    if not path.exists():
        return Floors()
    content = tomllib.loads(path.read_text())
    machines = {entry.pop("name"): entry for entry in content.get("machine", [])}
    return Floors([Floor(**row) for row in content.get("floor", [])], machines)


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def upper_median(ratios: Sequence[float], certainty: float = 0.95) -> float:
    """A bound that the true median of ``ratios`` stays below with this certainty, whatever their distribution.

    The number of pairs below the true median is binomial(n, 1/2), so an order statistic above the middle one bounds it.
    """
    ordered, count = sorted(ratios), len(ratios)
    bound = ordered[-1]
    for position in range(count - 1, -1, -1):
        # This one lies below the true median only if at most count - 1 - position pairs lie above it.
        risk = sum(math.comb(count, above) for above in range(count - position)) / 2**count
        if risk > 1 - certainty:
            break
        bound = ordered[position]
    return bound


def judge(
    floor: Floor, ratios: dict[str, list[float]], scatter: dict[str, float], ours: str, slack: float = 1.0
) -> Verdict:
    """Compares measured pairs with their floors, times ``slack``.

    Args:
        ratios: other's time over our time, pair by pair, by contestant.
        scatter: interquartile range over median of each contestant's times, ours included.
    """
    low, noisy = [], []
    for name, recorded in floor.against.items():
        lowest = slack * recorded
        if name not in ratios or upper_median(ratios[name]) >= lowest:
            continue
        seen = f"{statistics.median(ratios[name]):.2f}× {name}, below {lowest:.3g}×"
        worst = max((scatter[one], one) for one in (name, ours))
        if worst[0] > NOISY:
            noisy.append(f"{seen}, but the times of {worst[1]} scatter by {100 * worst[0]:.0f} %")
        else:
            low.append(seen)
    if low:
        return Verdict("fail", "; ".join(low))
    return Verdict("skip", "; ".join(noisy)) if noisy else Verdict("pass")
