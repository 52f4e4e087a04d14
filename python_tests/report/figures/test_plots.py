"""Widths and line breaks of texts in figures."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedkern.report.figures.plots import width, wrap_text


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
