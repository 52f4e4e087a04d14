"""Masks at their original size, on which Dice is computed, beside the resized ones for the network."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkern.data.images.image_files import run_in_threads

Classes = npt.NDArray[np.int16]
Packed = tuple[bytes, tuple[int, ...]]


@dataclass(eq=False)
class MaskStore:
    """Compressed masks of a data set, read on demand.

    Attributes:
        read: returns the classes of a mask by number, int16 ``[H, W]``, negative where unknown.
        size: side in pixels of the resized masks.
        square: whether masks are first padded to squares, equally on both sides.
    """

    read: Callable[[int], Classes]
    size: int
    square: bool = False
    packed: dict[int, Packed] = field(default_factory=dict)

    def classes(self, number: int) -> Classes:
        """Return a mask by number, int16 ``[H, W]``."""
        if number not in self.packed:
            self.pack(number, self.read(number))
        content, shape = self.packed[number]
        return np.frombuffer(zlib.decompress(content), np.int16).reshape(shape)

    def pack(self, number: int, classes: np.ndarray) -> None:
        self.packed[number] = zlib.compress(np.ascontiguousarray(classes, dtype=np.int16).tobytes(), 1), classes.shape

    def places(self, side: int, longest: int) -> npt.NDArray[np.int64]:
        """Return the resized mask's pixel for each of ``side`` pixels of a mask whose longer side is ``longest``."""
        extent = longest if self.square else side
        margin = (extent - side) // 2
        return (2 * (np.arange(side) + margin) + 1) * self.size // (2 * extent)


@dataclass(frozen=True, eq=False)
class FullMasks:
    """Masks of a split: those of a `MaskStore` at ``rows``, int64 ``[n]``."""

    store: MaskStore
    rows: Tensor

    def subset(self, indices: Tensor) -> FullMasks:
        return FullMasks(self.store, self.rows[indices])

    def load_masks(self) -> FullMasks | None:
        """Hold all masks in memory, compressed, or return None if none was resized."""
        numbers = sorted(set(self.rows.tolist()))
        run_in_threads(lambda place: self.store.classes(numbers[place]), len(numbers))
        sides = self.store.size, self.store.size
        return None if all(self.store.packed[number][1] == sides for number in numbers) else self

    def sizes(self) -> set[tuple[int, int]]:
        return {(shape[1], shape[0]) for _, shape in self.store.packed.values()}

    def __getitem__(self, index: int) -> tuple[Classes, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return a mask int16 ``[h, w]``, and for its rows and columns those of the network's mask."""
        classes = self.store.classes(int(self.rows[index]))
        rows, columns = (self.store.places(side, max(classes.shape)) for side in classes.shape)
        return classes, rows, columns

    def overlaps(self, predicted: Tensor, first_row: int, classes: int) -> Tensor:
        """Count pixels of images and classes (in both, predicted, true), int64 ``[B, 3, C]``.

        ``predicted``, int64 ``[B, h, w]``, are classes at network size, each for all full-size pixels within.
        """
        counts = np.zeros((len(predicted), 3, classes), dtype=np.int64)
        for row, guess in enumerate(predicted.cpu().numpy()):
            truth, rows, columns = self[first_row + row]
            valid = truth >= 0
            label, prediction = truth[valid], guess[rows[:, None], columns][valid]
            for part, values in enumerate((label[label == prediction], prediction, label)):
                counts[row, part] = np.bincount(values, minlength=classes)
        return torch.from_numpy(counts)
