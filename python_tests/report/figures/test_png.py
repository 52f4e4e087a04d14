"""PNG files of figures."""

import io

import numpy as np
import pytest
from PIL import Image

from fedkern.report.figures import png


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 1), (30, 41)])
def test_a_reader_finds_the_same_pixels(height, width):
    given = pixels(height, width)
    with Image.open(io.BytesIO(png.encode_png(given, 150))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(image), given)


def test_the_file_tells_the_resolution():
    with Image.open(io.BytesIO(png.encode_png(pixels(2, 2), 150))) as image:
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)


def test_checksums_are_those_of_the_chunks():
    written = bytearray(png.encode_png(pixels(3, 3), 150))
    with Image.open(io.BytesIO(written)) as image:
        image.verify()
    for at in (20, 45, len(written) - 30):  # a byte of every chunk that has some
        spoiled = written.copy()
        spoiled[at] ^= 1
        with pytest.raises((SyntaxError, OSError)), Image.open(io.BytesIO(spoiled)) as image:
            image.verify()


def test_equal_rows_take_no_room():
    given = pixels(1, 400).repeat(300, 0)
    assert len(png.encode_png(given, 150)) < given.size / 50
