"""Curves of a comparison: mean over seeds and its band, over communication rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedkern.report.figures.fitting import fitted
from fedkern.report.figures.plots import (
    COLOURS,
    DASHES,
    MARKERS,
    chance_lines,
    clock_of,
    entitle,
    legend_below,
    new_figure,
    over_clock,
    over_rounds,
)
from fedkern.report.names import entry
from fedkern.tasks.figure_names import scale, set_title, short_title, split_metric

NAMED, LEGEND = 24, 40
"""Most groups in the legend, and most characters of a group's name there."""


def mean_curve(runs: Sequence[Sequence[Mapping[str, Any]]], figure: str) -> tuple[np.ndarray, np.ndarray]:
    """A figure by round, of the records of several runs.

    Returns:
        int64 ``[n]``, the rounds in which every run that tells the figure does; fp64 ``[runs, n]``, its values.
    """
    tables = []
    for records in runs:
        found = {int(r["round"]): float(r[figure]) for r in records if isinstance(r.get(figure), (int, float))}
        if found:
            tables.append(found)
    rounds = sorted(set.intersection(*map(set, tables))) if tables else []
    values = [[table[r] for r in rounds] for table in tables]
    return np.array(rounds, dtype=np.int64), np.array(values, dtype=np.float64).reshape(len(tables), len(rounds))


def on_clock(groups: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> bool:
    """Whether curves are drawn over the virtual clock: some runs are asynchronous, and the records of all tell it."""
    every = [records for runs in groups.values() for records in runs]
    return any(map(clock_of, every)) and all("clock" in record for records in every for record in records)


def curves(
    groups: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    figures: Sequence[str],
    *,
    title: str = "",
    chance: Mapping[str, float] | None = None,
) -> Figure | None:
    """Draws every main figure in axes of its own: a curve for each group, with one standard deviation as its band.

    Args:
        groups: records of the rounds of every run, by the group's name.
        figures: names of the figures; shares are drawn in per cent.
        chance: see :func:`fedkern.report.chance.constants`.

    Returns:
        None if there was nothing to draw.
    """
    found = {figure: {name: mean_curve(runs, figure) for name, runs in groups.items()} for figure in figures}
    clocks = {name: mean_curve(runs, "clock") for name, runs in groups.items()} if on_clock(groups) else {}
    found = {figure: each for figure, each in found.items() if any(len(rounds) for rounds, _ in each.values())}
    if not found:
        return None
    figure = new_figure(7.2 if len(found) == 1 else 5.4 * len(found), 4.6)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, drawn) in zip(panels, found.items(), strict=True):
        last, (factor, unit) = 1.0, scale(name)
        for i, (group, (rounds, values)) in enumerate(drawn.items()):
            if not len(rounds):
                continue
            at = np.interp(rounds, clocks[group][0], clocks[group][1].mean(0)) if clocks else rounds
            colour, last = COLOURS[i % len(COLOURS)], max(last, float(at[-1]))
            mean = factor * values.mean(0)
            axes.plot(
                at, mean, DASHES[(i // len(COLOURS)) % len(DASHES)], color=colour,
                marker=MARKERS[i % len(MARKERS)], markevery=max(1, len(rounds) // 12), ms=5, lw=2,
                label=entry(group, LEGEND) if i < NAMED else None,
            )  # fmt: skip
            if len(values) > 1:
                band = factor * values.std(0, ddof=1)
                axes.fill_between(at, mean - band, mean + band, color=colour, alpha=0.18, lw=0)
                if len(rounds) == 1:  # a band over one round has no width
                    axes.errorbar(at, mean, band, color=colour, capsize=4, lw=1.5)
        test_set, figure_name = split_metric(name)
        chance_lines(axes, figure_name, [(chance or {}).get(name)])
        called = f"{short_title(figure_name)}{f', {set_title(test_set)}' if test_set else ''}"
        axes.set_ylabel(fitted(called + f" ({unit})" * bool(unit), 12, 3.4), fontsize=12)
        axes.set_xlim(0.5, last + 0.5)
        over_rounds(axes)
        if clocks:
            over_clock(axes, 0.0, last)
    entitle(figure, title)
    if any(len(values) > 1 for drawn in found.values() for _, values in drawn.values()):
        told = panels[0].get_title(loc="left")
        panels[0].set_title(f"{told}\nmean and standard deviation over seeds".strip(), fontsize=13, loc="left")
    legend_below(figure)
    return figure
