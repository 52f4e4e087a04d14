"""Sheets of small pictures in rows and columns, and pictures of a method's artifacts."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from contourpy import contour_generator
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curves
from matplotlib.transforms import Affine2D
from PIL import Image

from fedkern.engine.store.artifacts import Artifact
from fedkern.report.figures.plots import heat_map, new_figure, width, wrap_text
from fedkern.report.names import TITLE, label

LINE = 0.15
"""Inches between lines above or after a picture."""
_EDGE = 0.08  # inches around everything
_LEGEND = 11  # points
_MAP, _OPACITY = "inferno", 0.75  # colours of maps, and how much they hide of the picture below

Pixel = TypeVar("Pixel", bound=np.generic)
Colour = str | npt.NDArray[np.float64]
_Box = tuple[float, float, float, float]
"""Left, right, top and bottom in inches, from the top left corner of a sheet."""


class Sheet:
    """Pictures and texts at places in inches, from the top left corner.

    Axes for every picture, arranged by matplotlib, would take half a second at the end of a run.

    Args:
        columns: most pictures in a row.
        rows: inches above the pictures of every row.
        side: inches of a picture's longer side.
        left, right: inches before the first and after the last column.
        legend: texts and their colours, under the last row.
        scale: meaning of maps from 0 to 1, under the last row (empty: none).
    """

    def __init__(
        self, columns: int, rows: Sequence[float], *, side: float, left: float, title: str, right: float = 0.0,
        legend: Sequence[tuple[str, Colour]] = (), scale: str = "",
    ) -> None:  # fmt: skip
        gap = 0.08 * side
        wide = max(left + columns * (side + gap) + right + _EDGE, 5.0)
        lines = wrap_text(label(title, TITLE), 12, wide - 2 * _EDGE)
        top = 0.21 + 0.19 * len(lines.split("\n"))
        self._side, self._lefts = side, [left + k * (side + gap) for k in range(columns)]
        self._tops = [top + gap * i + side * i + sum(rows[: i + 1]) for i in range(len(rows))]
        below = self._tops[-1] + side + 0.08
        places = _flowing([text for text, _ in legend], wide)
        caption = wrap_text(scale, 9, wide - left - 1.55)
        high = 0.12 + LINE * (1 + caption.count("\n")) if scale else 0.0
        height = below + (0.22 * (places[-1][1] + 1) if places else 0.0) + high + _EDGE
        self.figure = Figure(figsize=(wide, height), dpi=150)
        self._inches = Affine2D().scale(1, -1).translate(0, height) + self.figure.dpi_scale_trans
        self._high = int(self.figure.bbox.height)
        self._text(_EDGE, (top + 0.04) / 2, lines, fontsize=12, ha="left", va="center")
        for (text, colour), (x, line) in zip(legend, places, strict=True):
            self._text(x, below + 0.22 * (line + 0.5), text, color=colour, fontsize=_LEGEND, va="center")
        if scale:
            at = below + 0.1 + LINE / 2
            colours = np.linspace(0, 1, 256, dtype=np.float32)[None]
            self._place((left, left + 1.2, at - 0.07, at + 0.07), colours)
            self._text(left - 0.05, at, "0", fontsize=9, ha="right", va="center")
            self._text(left + 1.25, at, "1", fontsize=9, va="center")
            self._text(left + 1.45, below + 0.1, caption, fontsize=9, va="top")

    def _text(self, x: float, y: float, text: str, **how: Any) -> None:
        self.figure.text(x, y, text, transform=self._inches, **how)

    def _box(self, row: int, column: int, shape: Sequence[int]) -> _Box:
        high, wide = (self._side * n / max(shape[0], shape[1]) for n in shape[:2])
        x = self._lefts[column] + (self._side - wide) / 2
        y = self._tops[row] + (self._side - high) / 2
        return x, x + wide, y, y + high

    def _place(self, box: _Box, image: npt.NDArray[Any], opacity: float = 1.0) -> None:
        """Draw an image ``[H, W, 3]``, or interpolated values ``[H, W]`` from 0 to 1 as colours."""
        left, right, top, bottom = (round(self.figure.dpi * inches) for inches in box)
        how = Image.Resampling.BILINEAR if image.ndim == 2 else Image.Resampling.NEAREST
        pixels = np.asarray(Image.fromarray(image).resize((right - left, bottom - top), how))
        pixels = colormaps[_MAP](pixels, bytes=True)[..., :3] if image.ndim == 2 else pixels
        opaque = np.full((*pixels.shape[:2], 1), round(255 * opacity), np.uint8)
        pixels = np.concatenate([pixels, opaque], axis=2)
        self.figure.figimage(pixels, left, self._high - bottom, origin="upper")

    def picture(self, row: int, column: int, image: npt.NDArray[Any]) -> None:
        """Draw an image ``[H, W, 3]``, uint8 or a float from 0 to 1."""
        image = image if image.dtype == np.uint8 else (255 * image).astype(np.uint8)
        self._place(self._box(row, column, image.shape), image)

    def map(self, row: int, column: int, values: npt.NDArray[np.floating[Any]]) -> None:
        """Lay an interpolated map ``[H, W]`` of values from 0 to 1 over a picture."""
        self._place(self._box(row, column, values.shape), values.astype(np.float32), _OPACITY)

    def outline(self, row: int, column: int, mask: npt.NDArray[np.bool_]) -> None:
        """Draw a white line around the True pixels of ``mask`` ``[H, W]``."""
        left, right, top, bottom = self._box(row, column, mask.shape)
        high, wide = mask.shape
        x = left + (right - left) * (np.arange(wide) + 0.5) / wide
        y = top + (bottom - top) * (np.arange(high) + 0.5) / high
        lines: Any = contour_generator(x, y, mask.astype(np.float64)).lines(0.5)
        curves = Curves.make_compound_path(*(Curves(line) for line in lines))
        how: dict[str, Any] = {"fill": False, "edgecolor": "white", "linewidth": 1.0, "joinstyle": "round"}
        self.figure.add_artist(PathPatch(curves, transform=self._inches, **how))

    def above(self, row: int, column: int, text: str, *, color: str = "#222222") -> None:
        x, y = self._lefts[column] + self._side / 2, self._tops[row] - 0.05
        self._text(x, y, text, fontsize=9, color=color, ha="center", va="bottom")

    def beside(self, row: int, text: str, *, upright: bool = False) -> None:
        x, y = self._lefts[0] - 0.1, self._tops[row] + self._side / 2
        how: dict[str, Any] = {"rotation": 90, "multialignment": "center"} if upright else {}
        self._text(x, y, text, fontsize=10, ha="right", va="center", **how)

    def after(self, row: int, lines: Sequence[tuple[str, str]]) -> None:
        x, y = self._lefts[-1] + self._side + 0.12, self._tops[row]
        for text, colour in lines:
            self._text(x, y, text, fontsize=9, color=colour, va="top")
            y += LINE * (1 + text.count("\n"))


def _flowing(texts: Sequence[str], wide: float) -> list[tuple[float, int]]:
    """Return left edge and line of every text of a legend that is ``wide`` inches."""
    places, x, line = [], _EDGE, 0
    for text in texts:
        needed = width(text, _LEGEND) + 0.2
        if x > _EDGE and x + needed > wide:
            x, line = _EDGE, line + 1
        places.append((x, line))
        x += needed
    return places


def to_rgb(image: npt.NDArray[Pixel]) -> npt.NDArray[Pixel]:
    """Return an image ``[C, H, W]`` as ``[H, W, 3]``, in grey from the first channel unless C is 3."""
    return np.moveaxis(image if len(image) == 3 else np.repeat(image[:1], 3, axis=0), 0, 2)


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
    figure.suptitle(wrap_text(label(title, TITLE), 12, figure.get_figwidth() - 0.2), fontsize=12, x=0.01, ha="left")
    return figure


def _number(value: float) -> str:
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.2f}") if np.isfinite(value) else "–"


def _names(axis: str, count: int, classes: Sequence[str]) -> list[str] | None:
    if count > 20:
        return None
    return [*map(label, classes)] if axis == "class" and len(classes) == count else [*map(str, range(count))]
