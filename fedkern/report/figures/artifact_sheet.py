"""Pictures of a method's artifacts: images over the rounds, tables as heat maps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedkern.engine.store.artifacts import Artifact
from fedkern.report.figures.fitting import fitted
from fedkern.report.figures.plots import ink, new_figure, save
from fedkern.report.figures.sheet import Sheet, rgb
from fedkern.report.names import TITLE, label

TABLES = 4  # tables side by side, evenly over the run


def draw(entries: Sequence[Artifact], path: Path, *, title: str, classes: Sequence[str] = ()) -> None:
    """Draws all artifacts of one name, in the order of their rounds: all images, or all tables.

    ``classes`` names the positions of an axis called ``"class"``.
    """
    if entries[0].value.dim() == 4:
        images(entries, path, title=title)
    else:
        tables(entries, path, title=title, classes=classes)


def images(entries: Sequence[Artifact], path: Path, *, title: str) -> None:
    """Draws a row of images for every round that was kept."""
    columns = max(len(entry.value) for entry in entries)
    sheet = Sheet(columns, [0.0] * len(entries), side=0.75, left=0.9, title=title)
    for row, entry in enumerate(entries):
        sheet.beside(row, f"round {entry.round}")
        for column, image in enumerate(entry.value):
            sheet.picture(row, column, rgb(image.numpy()))
    sheet.save(path)


def tables(entries: Sequence[Artifact], path: Path, *, title: str, classes: Sequence[str] = ()) -> None:
    """Draws tables of up to four rounds as heat maps on one scale; equal tables one after another are drawn once."""
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
    rows, columns = (max(value.shape[axis] for value in values) for axis in (0, 1))
    finite = np.concatenate([value[np.isfinite(value)] for value in values] or [np.zeros(0)])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low = min(low, 0.0) if low < 0.5 * high else low  # the scale starts at 0, unless all values are alike
    numbers = rows <= 12 and columns <= 12
    width, height = (0.5, 0.42) if numbers else (0.12, 0.12)
    each = min(max(1.0 + width * columns, 2.4), 6.0)
    across = min(2, len(firsts))
    down = -(-len(firsts) // across)
    figure = new_figure(max(each * across + 0.9, 5.0), min(max(1.3 + height * rows, 2.2), 10.0) * down + 0.3)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid[len(firsts) :]:
        axes.set_axis_off()
    images = []
    for axes, span, value in zip(grid, spans, values, strict=False):
        entry = span[0]
        image = axes.imshow(value, cmap="Blues", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        images.append(image)
        if numbers:
            for i, j in np.ndindex(value.shape):
                text = re.sub(r"^(-?)0\.", r"\1.", f"{value[i, j]:.2f}") if np.isfinite(value[i, j]) else "–"
                colour = ink(float(value[i, j] - low) / (high - low or 1))
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
        same = f"rounds {entry.round} to {span[-1].round}: the same"
        axes.set_title(same if len(span) > 1 else f"round {entry.round}", fontsize=10)
        axes.tick_params(labelsize=9, length=0 if numbers else 3)
        for name, count, axis in zip(entry.axes[:2], value.shape, (axes.yaxis, axes.xaxis), strict=True):
            if count > 20:
                continue
            by_class = name == "class" and len(classes) == count
            axis.set_ticks(
                range(count), [label(name) for name in classes] if by_class else [str(i) for i in range(count)]
            )
            if axis is axes.xaxis and by_class and any(len(name) > 3 for name in classes):
                for text in axis.get_ticklabels():
                    text.set(rotation=40, rotation_mode="anchor", ha="right")
        axes.set_xlabel(label(firsts[0].axes[1]), fontsize=10)
        for spine in axes.spines.values():
            spine.set_visible(False)
    for axes in grid[::across]:
        axes.set_ylabel(label(firsts[0].axes[0]), fontsize=10)
    bar = figure.colorbar(images[-1], ax=list(grid), pad=0.01)
    bar.ax.tick_params(labelsize=9)
    what = (*firsts[0].axes, firsts[0].name.replace("_", " "))[2]
    bar.set_label(fitted(label(what, TITLE), 10, figure.get_figheight() - 1), fontsize=10)
    lines = fitted(label(title, TITLE), 12, figure.get_figwidth() - 0.2)
    figure.suptitle(lines, fontsize=12, x=0.01, ha="left")
    save(figure, path)
