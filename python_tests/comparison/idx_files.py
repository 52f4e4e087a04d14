"""MNIST's four files with random pixels, and digits that occur equally often."""

import gzip
import struct
from pathlib import Path

import numpy as np


def write_mnist(folder: Path, *, train: int, test: int) -> None:
    """Write files of ``train`` and ``test`` images."""
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), (np.arange(count) % 10).astype(np.uint8)
        for kind, magic, array in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
            header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
