"""Figures of clients on their own test sets, compared and averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from fedkern.methods.roles import EvaluatedSet, TestSet
from fedkern.tasks.figure_names import direction


def over_clients(by_client: Mapping[int, Mapping[str, float]], sets: Mapping[int, TestSet]) -> dict[str, float]:
    """Return mean and worst client of the `comparable` figures, as ``mean_client_...`` and ``worst_client_...``.

    From 20 clients on the means of the worst and of the best tenth follow, as ``worst_tenth_client_...`` and
    ``best_tenth_client_...`` (as in arXiv 1905.10497).

    The worst value is the largest of a figure that is to fall, such as the loss. Clients without the figure are left
    out, and those with NaN if others have a number.
    """
    metrics: dict[str, float] = {}
    for name in comparable(by_client, sets):
        values = [figures[name] for figures in by_client.values() if name in figures]
        values = [value for value in values if not math.isnan(value)] or values
        metrics[f"mean_client_{name}"] = sum(values) / len(values)
        values.sort(reverse=_falls(name, sets))
        metrics[f"worst_client_{name}"] = values[0]
        if (tenth := len(values) // 10) > 1:
            metrics[f"worst_tenth_client_{name}"] = fmean(values[:tenth])
            metrics[f"best_tenth_client_{name}"] = fmean(values[-tenth:])
    return metrics


def comparable(by_client: Mapping[int, Mapping[str, float]], sets: Mapping[int, TestSet]) -> list[str]:
    """Return the names of figures that compare clients: ``loss`` and those of the task."""
    compared = {"loss", *_compared_names(sets)}
    return [name for name in dict.fromkeys(name for row in by_client.values() for name in row) if name in compared]


def _compared_names(sets: Mapping[int, TestSet]) -> tuple[str, ...]:
    sizes = [len(data) for data in sets.values()]
    return tuple(next(iter(sets.values())).task.comparable(sizes)) if sizes else ()


def _falls(name: str, sets: Mapping[int, TestSet]) -> bool:
    return any(direction(name, data.task.directions) == "min" for data in sets.values())


def with_undefined(
    by_client: Mapping[int, Mapping[str, float]], sets: Mapping[int, EvaluatedSet]
) -> dict[int, dict[str, float | None]]:
    lacking = {k: {sets[k].task.main: None} for k in by_client if not sets[k].task.has_main_figure(sets[k])}
    numbers = {k: {name: None if math.isnan(x) else x for name, x in by_client[k].items()} for k in by_client}
    return {k: {**lacking.get(k, {}), **figures} for k, figures in numbers.items()}


def worst_client(by_client: Mapping[int, Mapping[str, float]], sets: Mapping[int, TestSet]) -> tuple[int, str] | None:
    """Return the client with the worst main figure (or else loss), and that figure's name.

    Among equals, the largest loss decides. None with fewer than two clients with the figure; NaN is no figure.
    """
    names = comparable(by_client, sets)
    figure = next((name for name in (*_compared_names(sets), "loss") if name in names), None)
    judged = [k for k, figures in by_client.items() if not math.isnan(figures.get(figure or "", math.nan))]
    if figure is None or len(judged) < 2:
        return None

    def rank(k: int) -> tuple[float, float]:
        value = -by_client[k][figure] if _falls(figure, sets) else by_client[k][figure]
        return value, -by_client[k].get("loss", 0.0)

    return min(judged, key=rank), figure
