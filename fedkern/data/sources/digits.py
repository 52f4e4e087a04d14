"""The embedded default: UCI's 1,797 real handwritten digits, enlarged from 8x8 to 32x32."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fedkern.data.sources.listing import interleaved
from fedkern.data.types import Source, fixed_rows, memory_pool

SIZE = 32
TRAIN, VALIDATION = 1_200, 247  # the other 350 are the test set


def small_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits as UCI has them: images fp64 ``[1797, 8, 8]`` from 0 to 16, and labels int64 ``[1797]``.

    The file is a copy of scikit-learn's (digits.txt names source and licence).
    """
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        return stored["images"].astype(np.float64), stored["labels"].astype(np.int64)


def read_digits() -> tuple[Tensor, Tensor]:
    """The digits as images uint8 ``[1797, 1, 32, 32]`` and labels int64 ``[1797]``.

    Pillow's bicubic filter works in integers, so every machine gets the same bytes.
    """
    large, labels = _enlarged()
    return torch.from_numpy(large.copy()).unsqueeze(1), torch.from_numpy(labels.copy())


@cache
def _enlarged() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Kept, as a process often opens the digits more than once: a run and its pictures, the runs of a comparison."""
    pixels, labels = small_digits()
    small = np.rint(pixels * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for one in small]
    return np.stack(large), labels


def open_digits() -> Source:
    """The digits with their fixed split: 1,200 to train, 247 to validate, 350 to test, the same for every seed."""
    images, labels = read_digits()
    train, validation, test = fixed_rows(interleaved(labels.numpy(), "split/digits"), TRAIN, VALIDATION)
    return Source(
        classes=tuple(str(digit) for digit in range(10)),
        train=memory_pool(images, labels, "digits", train),
        validation=memory_pool(images, labels, "digits", validation),
        tests={"": memory_pool(images, labels, "digits", test)},
        mean=(0.3101,),
        std=(0.3490,),
        augment="none",
    )
