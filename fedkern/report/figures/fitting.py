"""Widths of texts in a picture, and texts broken into lines that fit a width."""

from __future__ import annotations

import warnings
from functools import lru_cache

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path


@lru_cache(maxsize=4096)
def width(text: str, size: float) -> float:
    """Inches that one line of text takes at a font size in points."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        points, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)
    return float(points) / 72


def fitted(text: str, size: float, inches: float) -> str:
    """A text in lines of at most ``inches``, broken between words, or inside a word that is longer than a line."""
    lines = [""]
    for word in text.split(" "):
        line = f"{lines[-1]} {word}" if lines[-1] else word
        if width(line, size) <= inches:
            lines[-1] = line
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while width(lines[-1], size) > inches and len(lines[-1]) > 1:
            rest = lines[-1]
            count = next(n for n in range(len(rest) - 1, 0, -1) if n == 1 or width(rest[:n], size) <= inches)
            lines[-1:] = [rest[:count], rest[count:]]
    return "\n".join(lines)
