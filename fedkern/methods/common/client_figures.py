"""Figures of clients on their own test sets, compared and taken together.

``sets`` are the clients' test sets (`fedkern.engine.reader.Reader`), and ``each`` holds the figures on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedkern.tasks.figure_names import direction


def over_clients(each: Mapping[int, Mapping[str, float]], sets: Mapping[int, Any]) -> dict[str, float]:
    """Mean and worst client of the clients' figures, as ``mean_client_...`` and ``worst_client_...``.

    The figures are those of `comparable`.  ``worst_client_...`` is the largest value of a figure that is to fall, such
    as the loss, and the smallest of any other.  Left out of both are clients without the figure, and those with NaN
    where some have a number.
    """
    metrics: dict[str, float] = {}
    for name in comparable(each, sets):
        values = [figures[name] for figures in each.values() if name in figures]
        values = [value for value in values if not math.isnan(value)] or values
        metrics[f"mean_client_{name}"] = sum(values) / len(values)
        metrics[f"worst_client_{name}"] = max(values) if _falls(name, sets) else min(values)
    return metrics


def comparable(each: Mapping[int, Mapping[str, float]], sets: Mapping[int, Any]) -> list[str]:
    """Names of the figures by which clients are compared: ``loss`` and those of the task.

    A client may lack a figure: a Dice needs an object in some mask, an area under a ROC curve images with the label and
    images without.
    """
    compared = {"loss", *_compared(sets)}
    return [name for name in dict.fromkeys(name for figures in each.values() for name in figures) if name in compared]


def _compared(sets: Mapping[int, Any]) -> tuple[str, ...]:
    sizes = [len(data) for data in sets.values()]
    return tuple(next(iter(sets.values())).task.comparable(sizes)) if sizes else ()


def _falls(name: str, sets: Mapping[int, Any]) -> bool:
    """Return whether a smaller figure is the better one."""
    return any(direction(name, data.task.directions) == "min" for data in sets.values())


def with_undefined(
    each: Mapping[int, Mapping[str, float]], sets: Mapping[int, Any]
) -> dict[int, dict[str, float | None]]:
    """Return the clients' figures, with None for NaN and for a main figure that is not defined on a client's set."""
    lacking = {k: {sets[k].task.main: None} for k in each if not sets[k].task.defined(sets[k])}
    numbers = {k: {name: None if math.isnan(value) else value for name, value in each[k].items()} for k in each}
    return {k: {**lacking.get(k, {}), **figures} for k, figures in numbers.items()}


def worst_client(each: Mapping[int, Mapping[str, float]], sets: Mapping[int, Any]) -> tuple[int, str] | None:
    """The client with the smallest main figure and that figure's name.

    By the loss where there is no main figure.

    Among equals the client with the largest loss.  None for fewer than two clients with the figure; NaN is no figure.
    """
    names = comparable(each, sets)
    figure = next((name for name in (*_compared(sets), "loss") if name in names), None)
    judged = [k for k, figures in each.items() if not math.isnan(figures.get(figure or "", math.nan))]
    if figure is None or len(judged) < 2:
        return None

    def rank(k: int) -> tuple[float, float]:
        value = -each[k][figure] if _falls(figure, sets) else each[k][figure]
        return value, -each[k].get("loss", 0.0)

    return min(judged, key=rank), figure
