"""Confusion picture: predicted classes of the images of every true class, for every test set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D

from fedkern.engine.store.confusions import Confusions
from fedkern.report.figures.plots import GREY, heat_map, wrap_text
from fedkern.report.names import TITLE, label
from fedkern.tasks.figure_names import set_title

NUMBERS = 20
"""Classes up to which the matrix has counts. Of more classes the commonest mistakes are listed."""
MISTAKES = 5
_TOP, _HEAD, _AXIS, _GAP, _LINE = 0.4, 0.5, 0.3, 0.35, 0.2  # inches: titles, names of axes, between panels, a line
_LEAST = 0.08  # inches from one readable name to the next
_PAD = 2 / 72  # inches from a matrix to its names


def draw_confusions(confusions: Confusions, *, title: str = "") -> Figure:
    """Draw at least one matrix, of at least one class, on one scale: the share of a true class's images."""
    # All places are in inches, computed from the sizes of cells and of class names.
    classes = len(confusions.classes)
    numbers = classes <= NUMBERS
    cell = max(0.42 if classes <= 10 else 0.36, 2.1 / classes) if numbers else min(max(6 / classes, 0.1), 16 / classes)
    name_step = math.ceil(_LEAST / cell)  # of very many classes, only every so many have their names written
    names = [label(name, 18) for name in confusions.classes]
    size = min(9.0, cell * name_step * 72 * 0.8)
    room = max(len(name) for name in names) * size * 0.62 / 72 + 0.1
    upright = room > cell * name_step
    below = (room if upright else size / 72 + 0.1) + _AXIS
    # Of many classes, the most frequent mistakes are listed below the matrix.
    lists = [] if numbers else [list_mistakes(matrix, confusions.classes) for matrix in confusions.matrices.values()]
    notes = 0.1 + _LINE * (1 + max(len(lines) for lines in lists)) if lists else 0.0
    across = min(2 if numbers else 1, len(confusions.matrices))
    down = -(-len(confusions.matrices) // across)
    side, left = classes * cell, _AXIS + room
    wide, high = left + side + _GAP, _HEAD + side + below + notes
    width = max(across * wide + 0.8, 5.0)
    heading = wrap_text(label(title, TITLE), 12, width - 0.2)
    top = _TOP + 0.19 * heading.count("\n") if title else 0.0
    height = top + down * high
    figure = Figure(figsize=(width, height), dpi=150)
    inches = Affine2D().scale(1, -1).translate(0, height) + figure.dpi_scale_trans  # from the top left corner

    def write(x: float, y: float, text: str, size: float = 10, ha: str = "center", **how: Any) -> None:
        # As texts, which take half the time of ticks.
        figure.text(x, y, text, transform=inches, fontsize=size, **{"ha": ha, "va": "center", **how})

    # Each test set has a matrix with its share of right answers above, and names at its left and below.
    upwards: dict[str, Any] = {"rotation": 90, "rotation_mode": "anchor"}
    write(0.1, top / 2 + 0.02, heading, 12, "left")
    for number, (name, matrix) in enumerate(confusions.matrices.items()):
        x, y = number % across * wide + left, top + number // across * high + _HEAD  # of the upper left corner
        end = y + side
        axes = figure.add_axes((x / width, 1 - end / height, side / width, side / height))
        _matrix(axes, matrix, cell * 72 if numbers else 0.0)
        right, count = int(np.trace(matrix)), int(matrix.sum())
        write(x, y - 0.29, label(set_title(name)), 10, "left")
        write(x, y - 0.1, f"{100 * right / max(count, 1):.1f} % of {count:,} right", 9, "left")
        for c in range(0, classes, name_step):
            along = (c + 0.5) * cell
            write(x - _PAD, y + along, names[c], size, "right")
            under: dict[str, Any] = {"ha": "right", **upwards} if upright else {"va": "top"}
            write(x + along, end + _PAD, names[c], size, **under)
        write(x + side / 2, end + below - 0.13, "predicted class")
        write(x - left + 0.15, y + side / 2, "true class", **upwards)
        for row, line in enumerate(("most frequent mistakes", *lists[number]) if lists else ()):
            write(x, end + below + 0.1 + row * _LINE, line, 9, "left", color="black" if row else GREY)
    # All matrices share one scale, at the right.
    x, y = across * wide - _GAP + 0.15, top + _HEAD
    bar = figure.add_axes((x / width, 1 - (y + side) / height, 0.12 / width, side / height))
    heat_map(bar, np.linspace(1, 0, 256)[:, None], 1.0, rows=[], columns=[])
    for share in (0.0, 0.5, 1.0):
        write(x + 0.17, y + (1 - share) * side, f"{100 * share:.0f} %", 8, "left")
    write(x + 0.65, y + side / 2, "share of the true class", **upwards)
    return figure


def list_mistakes(matrix: npt.NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    """Return the most frequent mistakes of a matrix as lines, the lower class first among equal counts."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]]
    return [f"{label(classes[i])} taken for {label(classes[j])}: {wrong[i, j]:,}" for i, j in pairs]


def _matrix(axes: Axes, matrix: npt.NDArray[np.int64], points: float) -> None:
    """Draw one matrix. ``points`` is the cell size, or 0 for no numbers."""
    totals = matrix.sum(1, keepdims=True)
    share = np.ma.masked_invalid(np.where(totals > 0, matrix / np.maximum(totals, 1), np.nan))
    texts = {(i, j): str(matrix[i, j]) for i, j in np.argwhere(matrix)} if points else {}
    digits = len(str(int(matrix.max(initial=0))))
    heat_map(axes, share, 1.0, texts=texts, rows=[], columns=[], size=min(10.0, 1.4 * points / digits) or 1.0)
    axes.spines[:].set(visible=True, color="#cccccc")
