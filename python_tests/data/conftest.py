"""Writers of generated data files in the official layouts."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def idx_bytes(array: np.ndarray) -> bytes:
    """Return an unsigned-byte array in IDX form."""
    magic = 0x00000800 + array.ndim
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def write_idx() -> Callable[..., dict[str, np.ndarray]]:
    """Write the four IDX files of a small MNIST-like set into a folder, and return their arrays."""

    def write(folder: Path, train: int = 120, test: int = 30, compressed: bool = False) -> dict[str, np.ndarray]:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        content = {
            "train-images-idx3-ubyte": rng.integers(0, 256, (train, 28, 28), dtype=np.uint8),
            "train-labels-idx1-ubyte": (np.arange(train) % 10).astype(np.uint8),
            "t10k-images-idx3-ubyte": rng.integers(0, 256, (test, 28, 28), dtype=np.uint8),
            "t10k-labels-idx1-ubyte": (np.arange(test) % 10).astype(np.uint8),
        }
        for name, array in content.items():
            raw = idx_bytes(array)
            if compressed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
            else:
                (folder / name).write_bytes(raw)
        return content

    return write
