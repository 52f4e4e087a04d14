"""Statistics over seeds: mean, standard deviation, paired differences with intervals, and the cost of a target."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from fedkern.errors import UserError
from fedkern.listeners.events import Record
from fedkern.tasks.figure_names import check_reachable, direction

LEVEL = 0.95
_TARGET = re.compile(r"\s*([^<>=]*[^<>=\s])\s*(<=|>=|=)\s*([^<>=]+)")


@dataclass(frozen=True)
class Difference:
    """Mean difference of two methods, paired by seed, and the ends of its interval (None for a single pair)."""

    mean: float
    low: float | None
    high: float | None


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation (n - 1) of at least one value, None as the deviation of a single one."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def complete_mean(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return `mean_std`, None for both without values or if one of them is unknown."""
    known = [value for value in values if value is not None]
    return mean_std(known) if known and len(known) == len(values) else (None, None)


def plus_minus(mean: float, deviation: float | None, text: Callable[[float], str]) -> str:
    """Return a mean, and ± its standard deviation if any, formatted by ``text``."""
    return text(mean) if deviation is None else f"{text(mean)} ± {text(deviation)}"


def interval_text(mean: float, low: float | None, high: float | None, text: Callable[[float], str]) -> str:
    """Return a mean, and its interval if any, formatted by ``text``."""
    return text(mean) if low is None or high is None else f"{text(mean)} [{text(low)}, {text(high)}]"


def compare_pairs(values: Mapping[int, float], base_values: Mapping[int, float]) -> Difference | None:
    """Return the differences ``values - base_values`` over shared seeds with Student's t interval, None without any.

    The interval assumes that the differences are normally distributed over seeds.
    """
    if not (seeds := values.keys() & base_values.keys()):
        return None
    differences = [values[seed] - base_values[seed] for seed in sorted(seeds)]
    mean, deviation = mean_std(differences)
    if deviation is None:
        return Difference(mean, None, None)
    from scipy.special import stdtrit  # what scipy.stats, which takes a second to load, calls

    half = float(stdtrit(len(seeds) - 1, (1 + LEVEL) / 2)) * deviation / math.sqrt(len(seeds))
    return Difference(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Target:
    """A value that a figure of the rounds' records is to reach: at least this value, at most if it ``falls``.

    ``falls`` is None until the runs determine it. A direction from the user is ``fixed``.
    """

    figure: str
    value: float
    falls: bool | None = None
    fixed: bool = False

    @classmethod
    def read(cls, text: str) -> Target:
        match = _TARGET.fullmatch(str(text))
        name, sign, number = match.groups() if match else ("", "", "nan")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f'--target needs the form FIGURE=VALUE, such as accuracy=0.8, got "{text}".')
        target = cls(name, value, falls=sign == "<=", fixed=True)
        target = target if sign != "=" else cls(name, value).with_direction([direction(name, {})])
        target.check()
        return target

    def with_direction(self, directions: Collection[str | None]) -> Target:
        """Return the target with the direction that all runs give its figure, unless the user gave one."""
        falls = {"min": True, "max": False}.get(next(iter(directions)) or "") if len({*directions}) == 1 else None
        return self if self.fixed else replace(self, falls=falls)

    def check_direction(self) -> None:
        if self.falls is None:
            ways = f"--target {self.figure}<={self.value:g} or --target {self.figure}>={self.value:g}"
            raise UserError(
                f'Nothing says whether a low "{self.figure}" is a good one: give the metric an attribute '
                f"higher_is_better, or write {ways}."
            )

    def check(self, sets: Collection[str] = ()) -> None:
        """Raise UserError if the figure is a fraction out of reach. ``sets`` are the runs' test sets."""
        check_reachable("--target", self.figure, self.value, falls=bool(self.falls), own=sets)

    def __str__(self) -> str:
        return f"{self.figure} {'<=' if self.falls else '>='} {self.value:g}"

    def crossing(self, records: Sequence[Record]) -> float | None:
        """Return the rounds up to the target on the curve of the best values so far, None if it is never reached.

        The curve is interpolated linearly between evaluated rounds (McMahan et al., arXiv 1602.05629, section 3).
        """
        sign = -1 if self.falls else 1
        curve: tuple[float, float] | None = None  # the last evaluated round and the best value so far
        for record in records:
            value = record.get(self.figure)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            number = float(record["round"])
            if sign * value >= sign * self.value:
                before, best = curve or (number, value)
                return number - (number - before) * (value - self.value) / (value - best) if curve else number
            curve = number, value if curve is None else sign * max(sign * value, sign * curve[1])
        return None

    def cost_of_target(self, records: Sequence[Record]) -> dict[str, float | None] | None:
        """Return round, bytes in both directions and seconds of the first round at the target, None without one."""
        for record in records:
            value = record.get(self.figure)
            if isinstance(value, (int, float)) and (value <= self.value if self.falls else value >= self.value):
                sent = [record[name] for name in ("bytes_up", "bytes_down") if name in record]
                total = sum(sent) if sent and None not in sent else None
                return {"rounds": record["round"], "bytes": total, "seconds": record.get("seconds")}
        return None
