"""Curves of a comparison: mean over seeds and its band, over communication rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedkern.listeners.events import Record
from fedkern.report.figures.curves import Curve, Panel, clock_of, levels, look
from fedkern.tasks.figure_names import scale, set_title, short_title, split_metric

Groups = Mapping[str, Sequence[Sequence[Record]]]
"""Round records of every run, by group name."""


def mean_curve(runs: Sequence[Sequence[Record]], figure: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounds, int64 ``[n]``, that all runs with the figure share, and the values, fp64 ``[runs, n]``."""
    all_tables = [
        {int(r["round"]): float(r[figure]) for r in records if isinstance(r.get(figure), (int, float))}
        for records in runs
    ]
    tables = [table for table in all_tables if table]
    rounds = sorted(set.intersection(*map(set, tables))) if tables else []
    values = [[table[r] for r in rounds] for table in tables]
    return np.array(rounds, dtype=np.int64), np.array(values, dtype=np.float64).reshape(len(tables), len(rounds))


def on_clock(groups: Groups) -> bool:
    """Return whether to draw over the virtual clock: if some runs are asynchronous and all records have the clock."""
    histories = [records for runs in groups.values() for records in runs]
    return any(map(clock_of, histories)) and all("clock" in record for records in histories for record in records)


def comparison_panels(
    groups: Groups, figures: Sequence[str], *, chance: Mapping[str, float] | None = None
) -> dict[str, Panel]:
    """Return a panel for every main figure, with a curve for each group and one standard deviation as its band.

    ``chance``: see :func:`fedkern.report.run_contents.constant_figures`.
    """
    clocks = {name: mean_curve(runs, "clock") for name, runs in groups.items()} if on_clock(groups) else {}
    panels = {}
    for figure in figures:
        (test_set, name), (factor, unit), curves = split_metric(figure), scale(figure), []
        for number, (group, runs) in enumerate(groups.items()):
            rounds, values = mean_curve(runs, figure)
            if len(rounds):
                at = np.interp(rounds, clocks[group][0], clocks[group][1].mean(0)).tolist() if clocks else None
                band = factor * values.std(0, ddof=1) if len(values) > 1 else None
                mean = (factor * values.mean(0)).tolist()
                curves.append(Curve(group, rounds.tolist(), mean, look(number), at=at, deviation=band))
        if curves:
            axis = f"{short_title(name)}{f', {set_title(test_set)}' if test_set else ''}"
            lines = levels(name, [(chance or {}).get(figure)])
            panels[figure] = Panel(axis, curves, unit, zero=False, **lines)
    return panels
