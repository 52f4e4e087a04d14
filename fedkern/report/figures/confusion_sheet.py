"""Confusion picture: for every test set, which class the images of every true class were taken for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedkern.engine.store.confusions import Confusions
from fedkern.report.figures.fitting import fitted
from fedkern.report.figures.plots import GREY, ink
from fedkern.report.names import TITLE, label
from fedkern.tasks.figure_names import set_title

NUMBERS = 20
"""Classes up to which counts are written into the matrix; of more classes the commonest mistakes are listed."""
MISTAKES = 5
_TOP, _HEAD, _AXIS, _GAP, _LINE = 0.4, 0.5, 0.3, 0.35, 0.2  # inches: titles, names of axes, between panels, a line
_LEAST = 0.08  # inches from one readable name to the next
_PAD = 2 / 72  # inches from a matrix to its names


def draw(confusions: Confusions, *, title: str = "") -> Figure:
    """Draws at least one matrix, of at least one class, on one scale of colours: the share of a true class's images."""
    classes = len(confusions.classes)
    numbers = classes <= NUMBERS
    cell = max(0.42 if classes <= 10 else 0.36, 2.1 / classes) if numbers else min(max(6 / classes, 0.1), 16 / classes)
    every = math.ceil(_LEAST / cell)  # of very many classes, only every so many have their names written
    names = [label(name, 18) for name in confusions.classes]
    size = min(9.0, cell * every * 72 * 0.8)
    room = max(len(name) for name in names) * size * 0.62 / 72 + 0.1
    upright = room > cell * every
    below = (room if upright else size / 72 + 0.1) + _AXIS
    lists = [] if numbers else [mistakes(matrix, confusions.classes) for matrix in confusions.matrices.values()]
    notes = 0.1 + _LINE * (1 + max(len(lines) for lines in lists)) if lists else 0.0
    across = min(2 if numbers else 1, len(confusions.matrices))
    down = -(-len(confusions.matrices) // across)
    side, left = classes * cell, _AXIS + room
    wide, high = left + side + _GAP, _HEAD + side + below + notes
    width = max(across * wide + 0.8, 5.0)
    heading = fitted(label(title, TITLE), 12, width - 0.2)
    top = _TOP + 0.19 * heading.count("\n") if title else 0.0
    height = top + down * high
    figure = Figure(figsize=(width, height), dpi=150)
    figure.text(0.1 / width, 1 - (top / 2 + 0.02) / height, heading, fontsize=12, ha="left", va="center")
    for number, (name, matrix) in enumerate(confusions.matrices.items()):
        x = number % across * wide + left
        y = top + number // across * high + _HEAD + side  # downwards, to the lower edge
        axes = figure.add_axes((x / width, 1 - y / height, side / width, side / height))
        _panel(axes, matrix, number_size=cell * 72 if numbers else 0.0)
        right, count = int(np.trace(matrix)), int(matrix.sum())
        share = f"{100 * right / max(count, 1):.1f} % of {count:,} right"
        for line, up in ((label(set_title(name)), 0.29), (share, 0.1)):
            figure.text(x / width, 1 - (y - side - up) / height, line, fontsize=10 if up > 0.2 else 9, va="center")
        upwards: dict[str, Any] = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        under = upwards if upright else {"ha": "center", "va": "top"}
        for c in range(0, classes, every):  # as texts, which take half the time of ticks
            along = (c + 0.5) * cell
            left_of, beside = (x - _PAD) / width, 1 - (y - side + along) / height
            figure.text(left_of, beside, names[c], fontsize=size, ha="right", va="center")
            figure.text((x + along) / width, 1 - (y + _PAD) / height, names[c], fontsize=size, **under)
        _axis_name(figure, (x + side / 2) / width, 1 - (y + below - 0.13) / height, "predicted class")
        _axis_name(figure, (x - left + 0.15) / width, 1 - (y - side / 2) / height, "true class", rotation=90)
        for row, line in enumerate(("most frequent mistakes", *lists[number]) if lists else ()):
            at = 1 - (y + below + 0.1 + row * _LINE) / height
            figure.text(x / width, at, line, fontsize=9, va="center", color="black" if row else GREY)
    x = across * wide - _GAP + 0.15
    bar = figure.add_axes((x / width, 1 - (top + _HEAD + side) / height, 0.12 / width, side / height))
    bar.imshow(np.linspace(1, 0, 256)[:, None], cmap="Blues", aspect="auto", extent=(0, 1, 0, 1))
    bar.set_xticks([])
    bar.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"], fontsize=8)
    bar.yaxis.tick_right()
    for spine in bar.spines.values():
        spine.set_visible(False)
    _axis_name(
        figure, (x + 0.65) / width, 1 - (top + _HEAD + side / 2) / height, "share of the true class", rotation=90
    )
    return figure


def mistakes(matrix: npt.NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    """The most frequent mistakes of a matrix, as lines of text; the lower class comes first among equal counts."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]]
    return [f"{label(classes[i])} taken for {label(classes[j])}: {wrong[i, j]:,}" for i, j in pairs]


def _panel(axes: Axes, matrix: npt.NDArray[np.int64], number_size: float) -> None:
    """One matrix; ``number_size``: points from one cell to the next, or 0 for no numbers."""
    totals = matrix.sum(1, keepdims=True)
    share = np.ma.masked_invalid(np.where(totals > 0, matrix / np.maximum(totals, 1), np.nan))
    colours = colormaps["Blues"].with_extremes(bad="#eeeeee")  # of classes without images
    axes.imshow(share, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if number_size:
        digits = len(str(int(matrix.max(initial=0))))
        size = min(10.0, 1.4 * number_size / digits)
        for i, j in np.argwhere(matrix):
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", fontsize=size, color=ink(share[i, j]))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#cccccc")


def _axis_name(figure: Figure, x: float, y: float, text: str, rotation: int = 0) -> None:
    figure.text(x, y, text, fontsize=10, ha="center", va="center", rotation=rotation, rotation_mode="anchor")
