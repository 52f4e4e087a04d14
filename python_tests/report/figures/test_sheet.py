"""Pictures on a sheet: their places, their scale, and their overlays."""

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from fedkern.report.figures.plots import save_png
from fedkern.report.figures.sheet import Sheet

SIDE, LEFT, DPI = 1.14, 0.9, 150
WHITE, RED, GREEN, BLUE, BLACK = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
FOUR = np.array([[RED, GREEN], [BLUE, BLACK]], dtype=np.uint8)


def sheet(columns: int = 1) -> Sheet:
    return Sheet(columns, [0.0], side=SIDE, left=LEFT, title="t")


def draw(made: Sheet, folder) -> np.ndarray:
    """Return the pixels of the first place, and of a margin of a tenth of its side around it."""
    save_png(made.figure, folder / "sheet.png")
    with Image.open(folder / "sheet.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[:2] == tuple(int(size) for size in made.figure.bbox.size[::-1])
    top = pixels.shape[0] / DPI - SIDE - 0.16  # inches from the last row to the lower edge: see Sheet
    edges = [round(DPI * inches) for inches in (top, top + SIDE, LEFT, LEFT + SIDE)]
    return pixels[edges[0] - 4 : edges[1] + 4, edges[2] - 4 : edges[3] + 4]


def test_pixels_are_scaled_to_even_squares(tmp_path):
    made = sheet()
    made.picture(0, 0, FOUR)
    pixels = draw(made, tmp_path)
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    assert {tuple(colour) for colour in colours.tolist()} == {WHITE, RED, GREEN, BLUE, BLACK}
    assert counts[:4].max() - counts[:4].min() <= 2 * DPI * SIDE  # a row and a column of the sheet's pixels
    half = len(pixels) // 2
    assert pixels[2, 2].tolist() == [255, 255, 255]
    for at, colour in (((9, 9), RED), ((9, -9), GREEN), ((-9, 9), BLUE), ((-9, -9), BLACK)):
        assert tuple(pixels[at]) == colour
    assert tuple(pixels[half - 3, half - 3]) == RED
    assert tuple(pixels[half + 3, half + 3]) == BLACK


def test_numbers_from_0_to_1_are_colours_as_well(tmp_path):
    integers, fractions = sheet(), sheet()
    integers.picture(0, 0, FOUR)
    fractions.picture(0, 0, FOUR / 255)
    np.testing.assert_array_equal(draw(integers, tmp_path), draw(fractions, tmp_path))


def test_an_oblong_picture_keeps_its_form_in_the_middle_of_its_place(tmp_path):
    made = sheet()
    made.picture(0, 0, np.zeros((1, 2, 3), dtype=np.uint8))
    dark = draw(made, tmp_path).sum(axis=2) == 0
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    assert len(columns) == pytest.approx(DPI * SIDE, abs=1)
    assert len(rows) == pytest.approx(DPI * SIDE / 2, abs=1)
    assert rows[0] + rows[-1] == pytest.approx(len(dark), abs=2)


def test_pictures_stand_side_by_side(tmp_path):
    made = sheet(2)
    made.picture(0, 1, FOUR)
    assert (draw(made, tmp_path) == 255).all()


def test_a_map_lies_over_its_picture_and_is_interpolated(tmp_path):
    made = sheet()
    made.picture(0, 0, np.full((1, 1, 3), 200, dtype=np.uint8))
    made.map(0, 0, np.array([[0.2, 1.0], [0.2, 1.0]], dtype=np.float32))
    pixels = draw(made, tmp_path)
    row = pixels[len(pixels) // 2, 6:-6]
    colours = colormaps["inferno"]
    for at, value in ((0, 0.2), (len(row) // 2, 0.6), (-1, 1.0)):
        np.testing.assert_allclose(row[at], 0.25 * 200 + 0.75 * 255 * np.array(colours(value)[:3]), atol=4)
    middle = row[len(row) // 4 : -len(row) // 4]
    assert np.abs(np.diff(middle, axis=0)).max() <= 12  # no step between the two halves


def test_the_points_of_a_map_are_the_middles_of_pixels(tmp_path):
    made = sheet()
    made.map(0, 0, np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    light = draw(made, tmp_path)[4:-4, 4:-4, 0]
    rows, columns = np.nonzero(light == light.max())
    assert rows.mean() == pytest.approx(len(light) / 2, abs=2)
    assert columns.mean() == pytest.approx(len(light) / 2, abs=2)


def test_an_outline_goes_between_the_pixels_of_a_mask_and_others(tmp_path):
    made = sheet()
    made.picture(0, 0, np.zeros((8, 8, 3), dtype=np.uint8))
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:5, 3:8] = True
    made.outline(0, 0, mask)
    light = draw(made, tmp_path)[4:-4, 4:-4].sum(axis=2) > 300
    cell = len(light) / 8
    rows, columns = np.flatnonzero(light.any(1)) + 0.5, np.flatnonzero(light.any(0)) + 0.5
    assert [rows[0], rows[-1]] == pytest.approx([2 * cell, 5 * cell], abs=2)
    assert columns[0] == pytest.approx(3 * cell, abs=2)
    assert columns[-1] == pytest.approx(7.5 * cell, abs=2)  # open at the edge of the picture
    assert not light[round(3.5 * cell), round(5.5 * cell)]


def test_a_mask_of_the_whole_picture_has_no_outline(tmp_path):
    made = sheet()
    made.picture(0, 0, np.zeros((4, 4, 3), dtype=np.uint8))
    made.outline(0, 0, np.ones((4, 4), dtype=bool))
    assert (draw(made, tmp_path)[6:-6, 6:-6] == 0).all()
