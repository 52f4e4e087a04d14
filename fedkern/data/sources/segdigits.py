"""Embedded segmentation data set: real handwritten digits on textured grounds.

Every image of 32x32 pixels holds one of UCI's digits, enlarged to 24 to 30 pixels.  Class 0 is the background and 1 + d
the ink of digit d.  Clients see similar backgrounds but unevenly many digits, so FedIOD's class-wise weights w_{k,c}
are nearly equal for the background and differ per digit.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkern.data.sources.digits import digit_source, load_glyphs, resize_glyph, small_digits
from fedkern.data.types import Source
from fedkern.streams import stream

SIZE = 32
SMALLEST, LARGEST = 24, 30  # side of a digit in pixels
CONTRAST = 90  # least difference in brightness between ink and ground
SCALE = (0.3837, 0.3838, 0.3849), (0.1769, 0.1771, 0.1764)


@cache
def read_segdigits() -> tuple[Tensor, Tensor]:
    """Return images uint8 ``[1797, 3, 32, 32]`` and pixel classes int64 ``[1797, 32, 32]``.

    Drawn in integers from a fixed stream, so all machines and seeds get the same bytes.
    """
    digits = small_digits()[1]
    images = np.empty((len(digits), SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.zeros((len(digits), SIZE, SIZE), dtype=np.int64)
    rng = stream(0, "segdigits")
    for i, glyph in enumerate(load_glyphs()):
        ground = int(rng.integers(40, 111))
        ink = ground + int(rng.integers(CONTRAST, CONTRAST + 31))
        side = int(rng.integers(SMALLEST, LARGEST + 1))
        top, left = rng.integers(0, SIZE - side + 1, size=2)
        cover = np.zeros((SIZE, SIZE), dtype=np.int64)
        cover[top : top + side, left : left + side] = resize_glyph(glyph, side)
        share = cover[..., None]
        images[i] = (share * _texture(ink, rng) + (255 - share) * _texture(ground, rng) + 127) // 255
        labels[i][cover >= 128] = 1 + int(digits[i])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def open_segdigits() -> Source:
    images, targets = read_segdigits()
    classes = ("background", *map(str, range(10)))
    return digit_source("segdigits", images, targets.flatten(1).amax(1), classes, SCALE, targets)


def _texture(brightness: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw colour noise at several scales with stripes, int64 ``[32, 32, 3]`` in 0 to 255."""
    values = np.full((SIZE, SIZE, 3), brightness, dtype=np.int64) + rng.integers(-18, 19, size=3)
    for cells, size in ((3, 24), (8, 20), (SIZE, 12)):
        grid = rng.integers(128 - size, 129 + size, size=(cells, cells, 3)).astype(np.uint8)
        values += resize_glyph(grid, SIZE).astype(np.int64) - 128
    across, down = rng.integers(-8, 9, size=2)
    period = int(rng.integers(24, 65))
    y, x = np.mgrid[:SIZE, :SIZE]
    values += int(rng.integers(0, 17)) * (2 * ((across * x + down * y) // period % 2) - 1)[..., None]
    return np.clip(values, 0, 255, out=values)
