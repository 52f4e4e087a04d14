"""SVHN (Netzer et al., 2011): the official cropped digits, 32x32 pixels in MATLAB files."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkern.data.sources.listing import interleave_classes
from fedkern.data.sources.table import find_folder, read_bytes
from fedkern.data.types import Source, memory_source
from fedkern.errors import UserError

VALIDATION_SHARE = 10
SIDE = 32
MAX_IMAGES = 1_000_000  # in a file


def read_mat(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Read ``X`` uint8 ``[32, 32, 3, n]`` and ``y`` ``[n, 1]``, in which 10 is the digit 0.

    Returns images uint8 ``[n, 3, 32, 32]`` and labels int64 ``[n]``, 0 to 9.
    """
    from scipy.io import loadmat, whosmat  # slow to import, so only when needed

    raw, path = read_bytes(folder, name, "svhn", lambda head, path: 2 * MAX_IMAGES * 3 * SIDE * SIDE)
    try:
        # Check the announced size before anything is decompressed.
        announced = {variable: shape for variable, shape, _ in whosmat(io.BytesIO(raw)) if variable in ("X", "y")}
        if any(math.prod(int(side) for side in shape) > MAX_IMAGES * 3 * SIDE * SIDE for shape in announced.values()):
            raise ValueError(f"it announces more than {MAX_IMAGES:,} images")
        content = loadmat(io.BytesIO(raw), variable_names=("X", "y"))
        pixels, labels = np.asarray(content["X"]), np.asarray(content["y"]).reshape(-1)
    except MemoryError:
        raise
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise UserError(
            f'data set "svhn": {path} is damaged or not the official MATLAB file with X and y ({error}); fetch it again'
        ) from None
    if pixels.dtype != np.uint8 or pixels.shape != (SIDE, SIDE, 3, len(labels)) or len(labels) == 0:
        raise UserError(
            f'data set "svhn": {path} holds X of {pixels.dtype} {list(pixels.shape)} and {len(labels)} labels, '
            f"expected uint8 [{SIDE}, {SIDE}, 3, n] and n labels"
        )
    if labels.dtype.kind not in "uif":
        raise UserError(f'data set "svhn": {path} holds labels of {labels.dtype}, expected whole numbers from 1 to 10')
    for label in labels[~((labels >= 0) & (labels <= 10) & (labels == np.rint(labels)))]:  # NaN fails all of these
        raise UserError(f'data set "svhn": {path} holds the label {label:g}, expected a whole number from 1 to 10')
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
    return images, torch.from_numpy(labels.astype(np.int64) % 10)


def open_svhn(root: str | Path | None) -> Source:
    """Read SVHN from ``root``, ``root/svhn`` or ``root/SVHN``."""
    files = "train_32x32.mat", "test_32x32.mat"
    folder = find_folder(root, "svhn", ("svhn", "SVHN"), files)
    train, test = (read_mat(folder, name) for name in files)
    order = interleave_classes(train[1].numpy(), "split/svhn")
    classes, held_out = tuple(str(digit) for digit in range(10)), max(1, len(order) // VALIDATION_SHARE)
    scale = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    # Not augmented: a flipped or shifted house number may be another number.
    return memory_source("svhn", train, test, held_out, classes, scale, order=order)
