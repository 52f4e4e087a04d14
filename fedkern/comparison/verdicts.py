"""Verdicts on a cell of a published table: our figures over seeds beside the paper's value."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedkern.comparison.found_runs import FoundRun, Group, main_figures
from fedkern.comparison.published import BEST, ROUNDS, PublishedCell
from fedkern.comparison.seed_statistics import Difference, compare_pairs
from fedkern.errors import UserError, suggest_name
from fedkern.report.tables import human_metric
from fedkern.tasks.figure_names import number_text

REPRODUCED, DIFFERS, UNDECIDED = "reproduced", "differs", "undecided"
SAME, REVERSED, BASELINE = (f"smaller scale: {text}" for text in ("same ordering", "reversed", "baseline"))
UNPUBLISHED, NO_DATA, NOT_PLAYED = "nothing published", "no data here", "not played"
VERDICTS = (REPRODUCED, DIFFERS, UNDECIDED, SAME, REVERSED, BASELINE, UNPUBLISHED, NO_DATA, NOT_PLAYED)


@dataclass(frozen=True)
class Outcome:
    """A cell whose runs are all finished.

    Attributes:
        values: the figure by seed, at least one, None for a seed that misses the target.
        effect: the figure at every point of the sweep, for people.
        seconds: of all runs together, None if unknown.
        bytes: sent in both directions, mean of the runs, and ``up`` those that clients sent, None if unknown.
        build: fedkern's version in the runs, "" in runs of another program.
        recorded: method and program of recorded runs, "" of runs that were played.
        date: UTC day on which the last run finished.
    """

    values: Mapping[int, float | None]
    rounds: Mapping[int, float] = field(default_factory=dict)
    effect: str = ""
    seconds: float | None = None
    bytes: float | None = None
    up: float | None = None
    build: str = ""
    recorded: str = ""
    date: str = ""

    @property
    def reached_values(self) -> dict[int, float]:
        return {seed: value for seed, value in self.values.items() if value is not None}


@dataclass(frozen=True)
class Verdict:
    """A verdict, one of `VERDICTS`, and its evidence.

    Attributes:
        detail: a few words, such as by how much the figure differs.
        ours: mean of the figure over the seeds with its interval, None if a seed has no figure.
        gap: mean difference to the baseline, paired by seed.
        published_gap: the paper's difference to its baseline.
    """

    kind: str
    detail: str = ""
    ours: Difference | None = None
    gap: Difference | None = None
    published_gap: float | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


def name_figure(cell: PublishedCell, run: FoundRun) -> PublishedCell:
    """Return the cell, with the run's main figure if it names none.

    Raises UserError if a value is published, and the main figure is no share.
    """
    if cell.figure:
        return cell
    main = next(iter(main_figures([Group("", "", {0: run})])), None)
    if main is None:
        raise _missing_figure(run.main, run, run.metrics)
    named_cell = replace(cell, figure=main)
    if cell.published is not None and not named_cell.is_share:
        raise UserError(
            f'The main figure of {run.folder} is no share: write figure = "{main}", and its value in its own unit.'
        )
    return named_cell


def figure_of(cell: PublishedCell, run: FoundRun) -> float | None:
    cell = name_figure(cell, run)
    if cell.goal is not None:
        check_figure(cell.goal.figure, run)
        return cell.goal.crossing(run.records)
    if cell.figure in run.metrics:
        return run.metrics[cell.figure]
    if cell.figure.startswith(BEST):
        return best_value(cell.figure.removeprefix(BEST), run)
    raise _missing_figure(cell.figure, run, run.metrics)


def best_value(figure: str, run: FoundRun) -> float:
    check_figure(figure, run)
    values = (record[figure] for record in run.records if isinstance(record.get(figure), float))
    return (min if is_lower_better(figure, run) else max)(filter(math.isfinite, values), default=math.nan)


def check_figure(figure: str, run: FoundRun) -> None:
    figures = {name for record in run.records for name, value in record.items() if isinstance(value, float)}
    if figure not in figures:
        raise _missing_figure(figure, run, figures)


def _missing_figure(figure: str, run: FoundRun, figures: Mapping[str, float] | set[str]) -> UserError:
    return UserError(
        f'The run in {run.folder} has no figure "{figure}": it has {", ".join(sorted(figures))}.'
        f"{suggest_name(figure, figures)}"
    )


def is_lower_better(figure: str, run: FoundRun) -> bool:
    if (better := run.direction(figure)) is None and figure != ROUNDS:
        raise UserError(f'The run in {run.folder} does not say whether a low "{figure}" is a good one: choose another.')
    return better != "max"


def rate_run(cell: PublishedCell, run: FoundRun) -> tuple[float, ...]:
    """Rate a run for the choice of a sweep's best point: larger is better, and missing the target is worse."""
    cell, reached = name_figure(cell, run), 1.0
    if cell.select == "validation":
        cell = replace(cell, figure=f"validation_{run.main}", target="")
    name, value = cell.figure, figure_of(cell, run)
    if value is None:
        assert cell.goal is not None
        name, reached = cell.goal.figure, 0.0
        value = best_value(name, run)
    return reached, -math.inf if math.isnan(value) else -value if is_lower_better(name, run) else value


def judge_cell(
    cell: PublishedCell, outcome: Outcome, baseline: Outcome | None = None, published_baseline: float | None = None
) -> Verdict:
    """Return the verdict on a cell whose runs are all finished.

    ``baseline`` is the outcome of the baseline's runs, None without a baseline or until it has finished.
    """
    values, base_values = outcome.reached_values, {} if baseline is None else baseline.reached_values
    published, gap = cell.published, compare_pairs(values, base_values)
    ours = compare_pairs(values, dict.fromkeys(values, 0.0)) if len(values) == len(outcome.values) else None
    published_gap = None if published is None or published_baseline is None else published - published_baseline

    def verdict(kind: str, detail: str = "") -> Verdict:
        return Verdict(kind, detail, ours, gap, published_gap)

    if published is None:
        return verdict(UNPUBLISHED)
    if cell.smaller and not cell.baseline:
        return verdict(BASELINE)
    if ours is None:
        return verdict(*_judge_missed_target(cell, published, outcome))
    if cell.smaller:
        missing_words = "its baseline is not played" if baseline is None else "it shares no seed with its baseline"
        return verdict(*_ordering(gap, published_gap, missing_words))
    return verdict(*_value(cell, published, ours))


def _value(cell: PublishedCell, published: float, ours: Difference) -> tuple[str, str]:
    if ours.low is None or ours.high is None:
        return UNDECIDED, "one seed has no interval"
    if not ours.low <= published <= ours.high:
        return DIFFERS, f"by {figure_text(cell, ours.mean - published, '+')}"
    half = (ours.high - ours.low) / 2
    if cell.tolerance is not None and half > cell.tolerance:
        return UNDECIDED, f"± {figure_text(cell, half)} is wider than ± {figure_text(cell, cell.tolerance)}"
    return REPRODUCED, ""


def _ordering(gap: Difference | None, published_gap: float | None, missing_words: str) -> tuple[str, str]:
    if gap is None or published_gap is None:
        return UNDECIDED, missing_words if gap is None else "the paper reports no value of the baseline"
    if gap.low is None or gap.high is None:
        return UNDECIDED, "one seed has no interval"
    if gap.low <= 0 <= gap.high:
        return UNDECIDED, "the interval of the difference holds 0"
    if published_gap == 0:
        return UNDECIDED, "the paper's values are equal"
    return (SAME if gap.mean * published_gap > 0 else REVERSED), ""


def _judge_missed_target(cell: PublishedCell, published: float, outcome: Outcome) -> tuple[str, str]:
    """Return the verdict if seeds miss the target: they need more rounds than they played."""
    missing = [outcome.rounds[seed] for seed, value in outcome.values.items() if value is None]
    count = f"{len(missing)} of {len(outcome.values)} seeds miss {cell.goal} in {min(missing):,.0f} rounds"
    fewest = min([*missing, *outcome.reached_values.values()])
    if not cell.smaller and fewest > published + (cell.tolerance or 0):
        return DIFFERS, f"by more than {figure_text(cell, fewest - published, '+')}; {count}"
    return UNDECIDED, count


def figure_text(cell: PublishedCell, value: float, sign: str = "") -> str:
    """Format a value of the cell's figure, or with ``sign`` "+" a difference."""
    if cell.figure == ROUNDS:
        return f"{value:{sign},.0f}"
    figure = cell.figure or "accuracy"  # the main figure of runs to come, a share
    return number_text(figure, value, sign) + " points" * cell.is_share if sign else human_metric(figure, value)
