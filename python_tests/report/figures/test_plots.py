"""Widths and line breaks of texts in figures, and their files."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fedkern.report.figures.plots import save_png, width, wrap_text


@pytest.mark.parametrize("text", ["accuracy", "WWW iii", "$a_{$", ""])
def test_widths_are_those_of_drawn_texts(text):
    figure = Figure(figsize=(4, 2), dpi=100)
    drawn = figure.text(0, 0.5, text, fontsize=12, parse_math=False)
    if text:
        box = drawn.get_window_extent(FigureCanvasAgg(figure).get_renderer())
        assert width(text, 12) == pytest.approx(box.width / 100, abs=0.04)
    else:
        assert width(text, 12) == 0


def test_lines_are_broken_between_words_and_inside_long_ones():
    assert wrap_text("one two", 9, 10) == "one two"
    assert wrap_text("malignant melanoma, taken for nevus", 9, 1.2) == "malignant\nmelanoma, taken\nfor nevus"
    lines = wrap_text("W" * 30, 9, 1.0).split("\n")
    assert "".join(lines) == "W" * 30
    assert max(width(line, 9) for line in lines) <= 1.0
    assert wrap_text("WW", 9, 0.01) == "W\nW"
    assert wrap_text("", 9, 1.0) == ""


def test_a_file_has_the_drawn_pixels_and_tells_its_resolution(tmp_path):
    figure = Figure(figsize=(2, 1), dpi=150, facecolor="#0072B2")
    save_png(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (300, 150))
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert (np.asarray(image) == (0, 0x72, 0xB2)).all()
