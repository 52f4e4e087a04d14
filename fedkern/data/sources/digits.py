"""Embedded default data set: UCI's 1,797 handwritten digits, enlarged from 8x8 to 32x32."""

from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fedkern.data.forms import Scale
from fedkern.data.sources.listing import interleave_classes
from fedkern.data.types import Source, fixed_rows, memory_pool

SIZE = 32
TRAIN, VALIDATION = 1_200, 247  # the other 350 are the test set

Bytes = npt.NDArray[np.uint8]


def small_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return UCI's images fp64 ``[1797, 8, 8]``, 0 to 16, and labels int64 ``[1797]``.

    The file is a copy of scikit-learn's (digits.txt names source and licence).
    """
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        return stored["images"].astype(np.float64), stored["labels"].astype(np.int64)


def load_glyphs() -> Bytes:
    """Return the digits as opacities, uint8 ``[1797, 8, 8]``."""
    return np.rint(small_digits()[0] * (255 / 16)).astype(np.uint8)


def resize_glyph(image: Bytes, side: int) -> Bytes:
    """Resize to ``side`` x ``side`` pixels with Pillow's bicubic filter, in integers so that all machines agree."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


@cache
def enlarge_digits() -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Return the digits uint8 ``[1797, 32, 32]`` and their labels, which callers must not change.

    Cached, as a process often opens the digits more than once.
    """
    return np.stack([resize_glyph(glyph, SIZE) for glyph in load_glyphs()]), small_digits()[1]


def read_digits() -> tuple[Tensor, Tensor]:
    """Return images uint8 ``[1797, 1, 32, 32]`` and labels int64 ``[1797]``."""
    large, labels = enlarge_digits()
    return torch.from_numpy(large.copy()).unsqueeze(1), torch.from_numpy(labels.copy())


def fixed_split(labels: npt.NDArray[np.int64]) -> list[Tensor]:
    """Return training, validation and test rows, the same for every seed."""
    return fixed_rows(interleave_classes(labels, "split/digits"), TRAIN, VALIDATION)


def digit_source(
    prefix: str, images: Tensor, labels: Tensor, classes: tuple[str, ...], scale: Scale, targets: Tensor | None = None
) -> Source:
    """Return a source with one image per digit and their fixed split."""
    train, validation, test = (
        memory_pool(images, labels, prefix, rows, targets) for rows in fixed_split(labels.numpy())
    )
    return Source(classes, train, validation, {"": test}, *scale)


def open_digits() -> Source:
    return digit_source("digits", *read_digits(), tuple(map(str, range(10))), ((0.3101,), (0.3490,)))
