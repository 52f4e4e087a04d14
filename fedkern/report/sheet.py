"""A sheet of small pictures in rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from fedkern.report.names import TITLE, label
from fedkern.report.plots import save

_EDGE = 0.08  # inches around everything


class Sheet:
    """Pictures on one axes in inches, from the top left corner.

    One axes per picture, arranged by matplotlib, would take three times as long: half a second at the end of a run.

    Args:
        columns: most pictures in a row.
        rows: inches above the pictures of every row, for :meth:`above`.
        side: the longer side of a picture, in inches.
        left: inches before the first column, for :meth:`beside`.
        below: inches under the last row.
        title: title of the sheet.
    """

    def __init__(
        self, columns: int, rows: Sequence[float], *, side: float, left: float, title: str, below: float = 0.0
    ) -> None:
        gap = 0.08 * side
        width = max(left + columns * (side + gap) + _EDGE, 5.0)
        top = 0.4
        self._side, self._lefts = side, [left + k * (side + gap) for k in range(columns)]
        self._tops = [top + gap * i + side * i + sum(rows[: i + 1]) for i in range(len(rows))]
        height = self._tops[-1] + side + _EDGE + below
        self.figure = Figure(figsize=(width, height), dpi=150)
        self._axes = self.figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()
        self._axes.set_xlim(0, width)
        self._axes.set_ylim(height, 0)  # downwards
        self._axes.text(_EDGE, 0.22, label(title, TITLE), fontsize=12, ha="left", va="center")

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
        self._axes.text(x, y, text, fontsize=10, ha="right", va="center", rotation=90 if upright else 0)

    def save(self, path: Path) -> None:
        """Writes the PNG, completely or not at all.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        save(self.figure, path)


def rgb(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An image ``[C, H, W]`` as ``[H, W, 3]``; unless C is 3, the first channel in grey."""
    shown = image if len(image) == 3 else np.repeat(image[:1], 3, axis=0)
    return np.moveaxis(shown, 0, 2)
