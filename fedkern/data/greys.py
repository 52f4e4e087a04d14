"""Greys of more than eight bits: the window of values that become black to white, and what of it a run tells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fedkern.data.images import is_deep, looked_at, upright_size
from fedkern.errors import UserError, listed

Window = tuple[float, float]
"""The stored values that become black and white."""
EACH = 4096
"""Pixels of a file, evenly spread, that percentiles are of."""
COLOURS = {"1": "black and white", "L": "grey", "LA": "grey", "F": "grey fractions", "P": "a palette", "RGBA": "RGB"}
"""Colours by Pillow's modes."""
_NUMBER = r"(-?\d+(?:\.\d+)?)"


def window_of(text: str, paths: Sequence[Path], max_pixels: int) -> Window | None:
    """Reads ``CENTRE,WIDTH``, as viewers of medical images have it, or percentiles, ``LOW%,HIGH%``; empty: None.

    Percentiles are of the pixels of up to `LOOKED_AT` files with more than eight bits.

    Raises:
        UserError: the text is neither, or the window holds no value.
    """
    if not text:
        return None
    if found := re.fullmatch(rf"{_NUMBER}\s*,\s*{_NUMBER}", text.strip()):
        centre, width = map(float, found.groups())
        low, high = centre - width / 2, centre + width / 2
    elif found := re.fullmatch(rf"{_NUMBER}%\s*,\s*{_NUMBER}%", text.strip()):
        ends = [float(end) for end in found.groups()]
        if not 0 <= ends[0] < ends[1] <= 100:
            raise UserError(
                f"the data option window has percentiles {text}: give two from 0 to 100, the lower one first"
            )
        values = [*looked_at(paths, max_pixels, _sample).values()]
        if not values:
            return None
        low, high = map(float, np.percentile(np.concatenate(values), ends))
    else:
        raise UserError(
            f'the data option window must be CENTRE,WIDTH such as 40,400, or percentiles such as 1%,99%, not "{text}"'
        )
    if not low < high:
        raise UserError(f"the data option window={text} holds no value between {low:g} and {high:g}: give a wider one")
    return low, high


def as_text(window: Window | None) -> str:
    """A window as :func:`window_of` reads it."""
    return "" if window is None else f"{(window[0] + window[1]) / 2!r},{window[1] - window[0]!r}"


def _sample(image: Image.Image) -> np.ndarray | None:
    if not is_deep(image) and image.mode != "F":
        return None
    values = np.asarray(image).reshape(-1)
    return values[:: max(1, -(-len(values) // EACH))].astype(np.float64)


def seen_as(paths: Sequence[Path], size: int, grey: bool, max_pixels: int) -> str:
    """Words on the sizes and colours of up to `LOOKED_AT` files, where a network sees other ones; else empty."""

    def tell(image: Image.Image) -> tuple[str, tuple[int, int]]:
        return "16-bit grey" if is_deep(image) else COLOURS.get(image.mode, image.mode), upright_size(image)

    told = looked_at(paths, max_pixels, tell).values()
    kinds = sorted({kind for kind, _ in told})
    sizes = sorted({sides for _, sides in told}, key=lambda sides: (sides[0] * sides[1], sides))
    own = "grey" if grey else "RGB"
    if not sizes or (kinds == [own] and sizes == [(size, size)]):
        return ""
    ends = " to ".join(dict.fromkeys(f"{width}x{height}" for width, height in (sizes[0], sizes[-1])))
    return f"images of {ends} pixels in {listed(kinds)}, seen as {size}x{size} in {own}"
