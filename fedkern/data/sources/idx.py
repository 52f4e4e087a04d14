"""MNIST and Fashion-MNIST: the official IDX files."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkern.data.sources.table import find_folder, read_bytes
from fedkern.data.types import Source, memory_source
from fedkern.errors import UserError

IMAGES_MAGIC, LABELS_MAGIC = 0x00000803, 0x00000801
# One image in six of the official training set is held out for validation, the same images for every seed.
VALIDATION_SHARE = 6


@dataclass(frozen=True)
class IdxSet:
    title: str
    subfolders: tuple[str, ...]
    classes: tuple[str, ...]
    mean: float
    std: float
    # Fashion-MNIST has exactly 6,000 images of every class and MNIST does not, which identifies their files.
    balanced: bool


IDX_SETS = {
    "mnist": IdxSet(
        "MNIST", ("MNIST/raw", "mnist", "MNIST"), tuple(str(digit) for digit in range(10)), 0.1307, 0.3081, False
    ),
    "fashionmnist": IdxSet(
        "Fashion-MNIST",
        ("FashionMNIST/raw", "fashionmnist", "FashionMNIST", "fashion"),
        ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        0.2860,
        0.3530,
        True,
    ),
}

_FILES = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def read_idx(folder: Path, name: str, data: str, dimensions: int) -> np.ndarray:
    """Read an IDX file as a writable uint8 array with 3 axes (images) or 1 (labels)."""
    magic = IMAGES_MAGIC if dimensions == 3 else LABELS_MAGIC
    header = 4 * (1 + dimensions)

    def read_shape(head: bytes, path: Path) -> list[int]:
        number, *shape = struct.unpack_from(f">{1 + dimensions}I", head)
        if number != magic:
            noun = "images" if dimensions == 3 else "labels"
            raise UserError(
                f'data set "{data}": {path} starts with magic {number:#010x}, expected {magic:#010x} (IDX {noun})'
            )
        return shape

    raw, path = read_bytes(folder, name, data, lambda head, path: header + math.prod(read_shape(head, path)), header)
    if len(raw) < header:
        raise UserError(f'data set "{data}": {path} has {len(raw)} bytes, fewer than the {header} of an IDX header')
    shape = read_shape(raw, path)
    expected, size = header + math.prod(shape), "x".join(str(axis) for axis in shape)
    if len(raw) != expected:
        raise UserError(
            f'data set "{data}": {path} holds {len(raw)} bytes, expected {expected} for the {size} its header announces'
        )
    if expected == header:
        raise UserError(f'data set "{data}": {path} announces {size}, which is nothing')
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def open_idx(data: str, root: str | Path | None) -> Source:
    """Read MNIST or Fashion-MNIST from ``root``, ``root/<name>`` or torchvision's layout."""
    idx_set = IDX_SETS[data]
    folder = find_folder(root, data, idx_set.subfolders, _FILES)
    train_images, train_labels = _read_pair(folder, data, _FILES[0], _FILES[1], len(idx_set.classes))
    test_images, test_labels = _read_pair(folder, data, _FILES[2], _FILES[3], len(idx_set.classes))
    if test_images.shape[1:] != train_images.shape[1:]:
        raise UserError(
            f'data set "{data}": test images of {tuple(test_images.shape[2:])} pixels do not fit training images of '
            f"{tuple(train_images.shape[2:])} in {folder}"
        )
    counts = torch.bincount(train_labels, minlength=10)
    if len(train_labels) == 60_000 and bool((counts == 6_000).all()) != idx_set.balanced:
        likely = IDX_SETS["mnist" if data == "fashionmnist" else "fashionmnist"]
        raise UserError(f'data set "{data}": the files in {folder} are not {idx_set.title} (probably {likely.title})')
    train, test = (train_images, train_labels), (test_images, test_labels)
    scale = (idx_set.mean,), (idx_set.std,)
    return memory_source(data, train, test, len(train_labels) // VALIDATION_SHARE, idx_set.classes, scale)


def _read_pair(folder: Path, data: str, images: str, labels: str, classes: int) -> tuple[Tensor, Tensor]:
    pixels = read_idx(folder, images, data, 3)
    names = read_idx(folder, labels, data, 1)
    if len(pixels) != len(names):
        raise UserError(
            f'data set "{data}": {folder / images} announces {len(pixels)} images but {folder / labels} '
            f"{len(names)} labels"
        )
    if names.max() >= classes:
        raise UserError(f'data set "{data}": {folder / labels} holds label {names.max()}, expected 0 to {classes - 1}')
    return torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(names.astype(np.int64))
