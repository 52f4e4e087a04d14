"""A sheet of small pictures in rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from fedkern.report.fitting import fitted, width
from fedkern.report.names import TITLE, label
from fedkern.report.plots import save

LINE = 0.15
"""Inches from a line above or after a picture to the next."""
_EDGE = 0.08  # inches around everything
_LEGEND = 11  # points


class Sheet:
    """Pictures on one axes in inches, from the top left corner.

    One axes per picture, arranged by matplotlib, would take three times as long: half a second at the end of a run.

    Args:
        columns: most pictures in a row.
        rows: inches above the pictures of every row, for :meth:`above`.
        side: the longer side of a picture, in inches.
        left: inches before the first column, for :meth:`beside`.
        right: inches after the last column, for :meth:`after`.
        title: title of the sheet.
        legend: texts and their colours, under the last row.
        scale: what the map "inferno" shows from 0 to 1, under the last row; empty for no such scale.
    """

    def __init__(
        self,
        columns: int,
        rows: Sequence[float],
        *,
        side: float,
        left: float,
        title: str,
        right: float = 0.0,
        legend: Sequence[tuple[str, Any]] = (),
        scale: str = "",
    ) -> None:
        gap = 0.08 * side
        wide = max(left + columns * (side + gap) + right + _EDGE, 5.0)
        lines = fitted(label(title, TITLE), 12, wide - 2 * _EDGE)
        top = 0.21 + 0.19 * len(lines.split("\n"))
        self._side, self._lefts = side, [left + k * (side + gap) for k in range(columns)]
        self._tops = [top + gap * i + side * i + sum(rows[: i + 1]) for i in range(len(rows))]
        below = self._tops[-1] + side + 0.08
        places = _flowing([text for text, _ in legend], wide)
        told = fitted(scale, 9, wide - left - 1.55)
        high = 0.12 + LINE * (1 + told.count("\n")) if scale else 0.0
        height = below + (0.22 * (places[-1][1] + 1) if places else 0.0) + high + _EDGE
        self.figure = Figure(figsize=(wide, height), dpi=150)
        self._axes = self.figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()
        self._axes.set_xlim(0, wide)
        self._axes.set_ylim(height, 0)  # downwards
        self._axes.text(_EDGE, (top + 0.04) / 2, lines, fontsize=12, ha="left", va="center")
        for (text, colour), (x, line) in zip(legend, places, strict=True):
            self._axes.text(x, below + 0.22 * (line + 0.5), text, color=colour, fontsize=_LEGEND, va="center")
        if scale:
            at = below + 0.1 + LINE / 2
            ends = (left, left + 1.2, at + 0.07, at - 0.07)
            self._axes.imshow(np.linspace(0, 1, 256)[None], cmap="inferno", extent=ends, aspect="auto")
            self._axes.text(left - 0.05, at, "0", fontsize=9, ha="right", va="center")
            self._axes.text(left + 1.25, at, "1", fontsize=9, va="center")
            self._axes.text(left + 1.45, below + 0.1, told, fontsize=9, va="top")

    def _box(self, row: int, column: int, shape: Sequence[int]) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of a picture of ``shape`` (rows and columns of pixels), centred in its place."""
        high, wide = (self._side * n / max(shape[0], shape[1]) for n in shape[:2])
        x = self._lefts[column] + (self._side - wide) / 2
        y = self._tops[row] + (self._side - high) / 2
        return x, x + wide, y + high, y

    def picture(self, row: int, column: int, image: npt.NDArray[Any], **how: Any) -> None:
        """Draws an image ``[H, W]`` or ``[H, W, 3]``, over an earlier one if any; ``how`` goes to ``Axes.imshow``."""
        how = {"interpolation": "nearest", **how}
        self._axes.imshow(image, extent=self._box(row, column, image.shape), aspect="auto", origin="upper", **how)

    def outline(self, row: int, column: int, mask: npt.NDArray[np.bool_]) -> None:
        """Draws a white line around the True pixels of ``mask`` ``[H, W]``."""
        left, right, bottom, top = self._box(row, column, mask.shape)
        high, wide = mask.shape
        x = left + (right - left) * (np.arange(wide) + 0.5) / wide
        y = top + (bottom - top) * (np.arange(high) + 0.5) / high
        self._axes.contour(x, y, mask.astype(float), levels=[0.5], colors="white", linewidths=1.0)

    def above(self, row: int, column: int, text: str, *, color: str = "#222222") -> None:
        """Writes a text above a picture."""
        x, y = self._lefts[column] + self._side / 2, self._tops[row] - 0.05
        self._axes.text(x, y, text, fontsize=9, color=color, ha="center", va="bottom")

    def beside(self, row: int, text: str, *, upright: bool = False) -> None:
        """Writes a text to the left of a row, rotated by 90 degrees if ``upright``."""
        x, y = self._lefts[0] - 0.1, self._tops[row] + self._side / 2
        how: dict[str, Any] = {"rotation": 90, "multialignment": "center"} if upright else {}
        self._axes.text(x, y, text, fontsize=10, ha="right", va="center", **how)

    def after(self, row: int, lines: Sequence[tuple[str, str]]) -> None:
        """Writes lines with their colours to the right of a row, from the top of its pictures."""
        x, y = self._lefts[-1] + self._side + 0.12, self._tops[row]
        for text, colour in lines:
            self._axes.text(x, y, text, fontsize=9, color=colour, va="top")
            y += LINE * (1 + text.count("\n"))

    def save(self, path: Path) -> None:
        """Writes the PNG, completely or not at all.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        save(self.figure, path)


def _flowing(texts: Sequence[str], wide: float) -> list[tuple[float, int]]:
    """Left edge and line of every text of a legend that is ``wide`` inches."""
    places, x, line = [], _EDGE, 0
    for text in texts:
        needed = width(text, _LEGEND) + 0.2
        if x > _EDGE and x + needed > wide:
            x, line = _EDGE, line + 1
        places.append((x, line))
        x += needed
    return places


def rgb(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An image ``[C, H, W]`` as ``[H, W, 3]``; unless C is 3, the first channel in grey."""
    shown = image if len(image) == 3 else np.repeat(image[:1], 3, axis=0)
    return np.moveaxis(shown, 0, 2)
