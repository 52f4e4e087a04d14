"""Figures of clients on their own test sets, compared and taken together.

``sets`` are the clients' test sets (`fedkern.engine.samples.TestSet`), and ``each`` holds the figures on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedkern.data.image_rows import in_parts

CLIENT_FIGURES = ("accuracy", "dice", "macro_auroc")
RECALLS = ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5")


def over_clients(each: Mapping[int, Mapping[str, float]], sets: Mapping[int, Any]) -> dict[str, float]:
    """Mean and worst client of the clients' figures, as ``mean_client_...`` and ``worst_client_...``.

    The figures are those of `comparable`.  ``worst_client_loss`` is the largest loss; ``worst_client_...`` of any other
    figure is the smallest value.  Left out of both are clients without the figure.
    """
    metrics: dict[str, float] = {}
    for name in comparable(each, sets):
        values = [figures[name] for figures in each.values() if name in figures]
        metrics[f"mean_client_{name}"] = sum(values) / len(values)
        metrics[f"worst_client_{name}"] = max(values) if name == "loss" else min(values)
    return metrics


def comparable(each: Mapping[int, Mapping[str, float]], sets: Mapping[int, Any]) -> list[str]:
    """Names of the figures by which clients are compared: ``loss`` and the main figures.

    Recall is one of them only where all clients have the same number of candidates.  A client may lack a figure: a Dice
    needs an object in some mask, an area under a ROC curve images with the label and images without.
    """
    even = len({len(data) for data in sets.values()}) == 1
    named = dict.fromkeys(name for figures in each.values() for name in figures)
    return [name for name in named if name == "loss" or name in CLIENT_FIGURES or (even and name in RECALLS)]


def with_undefined(
    each: Mapping[int, Mapping[str, float]], sets: Mapping[int, Any]
) -> dict[int, dict[str, float | None]]:
    """The clients' figures, with None for a main figure that is not defined on a client's set."""
    lacking = {k: undefined(sets[k]) for k in each}
    return {k: {**({lacking[k]: None} if lacking[k] else {}), **figures} for k, figures in each.items()}


def undefined(data: Any) -> str:
    """The main figure that a set cannot have, whatever is predicted; empty where it has one.

    A Dice needs an object in some mask, an area under a ROC curve a label that some images have and others lack.
    """
    if data.task == "segmentation":
        full = data.full
        masks = in_parts(data.labels) if full is None else (full[row][0] for row in range(len(data)))
        return "" if any(bool((mask > 0).any()) for mask in masks) else "dice"
    if data.task == "multilabel":
        return "" if bool((data.labels != data.labels[:1]).any()) else "macro_auroc"
    return ""


def worst_client(each: Mapping[int, Mapping[str, float]], sets: Mapping[int, Any]) -> tuple[int, str] | None:
    """The client with the smallest main figure and that figure's name; by the loss where there is no main figure.

    Among equals the client with the largest loss.  None for fewer than two clients with the figure, or where a figure
    is NaN.
    """
    names = comparable(each, sets)
    figure = next((name for name in (*CLIENT_FIGURES, *RECALLS, "loss") if name in names), None)
    judged = [k for k, figures in each.items() if figure in figures]
    if figure is None or len(judged) < 2 or any(each[k][figure] != each[k][figure] for k in judged):
        return None

    def rank(k: int) -> tuple[float, float]:
        loss = each[k].get("loss", 0.0)
        return (-loss, 0.0) if figure == "loss" else (each[k][figure], -loss)

    return min(judged, key=rank), figure
