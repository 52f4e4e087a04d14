"""Pictures of a method's artifacts: images over the rounds, tables as heat maps."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from fedkern.engine.store.artifacts import Artifact
from fedkern.report.figures.plots import heat_map, new_figure, wrap_text
from fedkern.report.figures.sheet import Sheet, to_rgb
from fedkern.report.names import TITLE, label

TABLES = 4  # tables side by side, evenly over the run


def draw_sheet(entries: Sequence[Artifact], *, title: str, classes: Sequence[str] = ()) -> Figure:
    """Draw all artifacts of one name, all images or all tables, in the order of their rounds.

    ``classes`` names the positions of an axis called ``"class"``.
    """
    return images(entries, title) if entries[0].value.dim() == 4 else tables(entries, title, classes)


def images(entries: Sequence[Artifact], title: str) -> Figure:
    columns = max(len(entry.value) for entry in entries)
    sheet = Sheet(columns, [0.0] * len(entries), side=0.75, left=0.9, title=title)
    for row, entry in enumerate(entries):
        sheet.beside(row, f"round {entry.round}")
        for column, image in enumerate(entry.value):
            sheet.picture(row, column, to_rgb(image.numpy()))
    return sheet.figure


def tables(entries: Sequence[Artifact], title: str, classes: Sequence[str]) -> Figure:
    """Draw tables of up to four rounds as heat maps on one scale, and consecutive equal tables once."""
    spans: list[list[Artifact]] = []
    for entry in entries:
        last = spans[-1][0].value if spans else None
        if last is not None and torch.equal(last.nan_to_num(-1e30), entry.value.nan_to_num(-1e30)):
            spans[-1].append(entry)
        else:
            spans.append([entry])
    spans = [spans[i] for i in sorted({round(i) for i in np.linspace(0, len(spans) - 1, TABLES)})]
    firsts = [span[0] for span in spans]
    values = [entry.value.numpy() for entry in firsts]
    high_count, wide_count = (max(value.shape[axis] for value in values) for axis in (0, 1))
    finite = np.concatenate([value[np.isfinite(value)] for value in values] or [np.zeros(0)])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low = min(low, 0.0) if low < 0.5 * high else low  # the scale starts at 0, unless all values are alike
    numbers = high_count <= 12 and wide_count <= 12
    width, height = (0.5, 0.42) if numbers else (0.12, 0.12)
    side = min(max(1.0 + width * wide_count, 2.4), 6.0)
    across = min(2, len(firsts))
    down = -(-len(firsts) // across)
    figure = new_figure(max(side * across + 0.9, 5.0), min(max(1.3 + height * high_count, 2.2), 10.0) * down + 0.3)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid[len(firsts) :]:
        axes.set_axis_off()
    for axes, span, value in zip(grid, spans, values, strict=False):
        texts = {at: _number(float(value[at])) for at in np.ndindex(value.shape)} if numbers else {}
        rows, columns = (_names(*pair, classes) for pair in zip(span[0].axes, value.shape, strict=False))
        image = heat_map(axes, value, high, low=low, texts=texts, rows=rows, columns=columns, size=8)
        span_title = f"rounds {span[0].round} to {span[-1].round}: the same"
        axes.set_title(span_title if len(span) > 1 else f"round {span[0].round}", fontsize=10)
        axes.tick_params(labelsize=9)
        axes.set_xlabel(label(firsts[0].axes[1]), fontsize=10)
    for axes in grid[::across]:
        axes.set_ylabel(label(firsts[0].axes[0]), fontsize=10)
    bar = figure.colorbar(image, ax=list(grid), pad=0.01)
    bar.ax.tick_params(labelsize=9)
    bar_label = (*firsts[0].axes, firsts[0].name.replace("_", " "))[2]
    bar.set_label(wrap_text(label(bar_label, TITLE), 10, figure.get_figheight() - 1), fontsize=10)
    lines = wrap_text(label(title, TITLE), 12, figure.get_figwidth() - 0.2)
    figure.suptitle(lines, fontsize=12, x=0.01, ha="left")
    return figure


def _number(value: float) -> str:
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.2f}") if np.isfinite(value) else "–"


def _names(axis: str, count: int, classes: Sequence[str]) -> list[str] | None:
    if count > 20:
        return None
    return [*map(label, classes)] if axis == "class" and len(classes) == count else [*map(str, range(count))]
