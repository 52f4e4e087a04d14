"""Masks in the sizes in which they are given, beside the shrunken ones that a network sees: what a Dice counts."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkern.data.images.image_files import each

Classes = npt.NDArray[np.int16]
Packed = tuple[bytes, tuple[int, ...]]


@dataclass(eq=False)
class MaskStore:
    """All masks of a data set, read when they are needed and then held compressed.

    Attributes:
        read: the class of every pixel of the mask with a number, int16 ``[H, W]``, negative where it is unknown.
        size: side in pixels to which masks are resized for the network.
        square: masks are first padded to squares, with the same margin on both sides.
    """

    read: Callable[[int], Classes]
    size: int
    square: bool = False
    packed: dict[int, Packed] = field(default_factory=dict)

    def classes(self, number: int) -> Classes:
        """Return the mask with a number, int16 ``[H, W]``."""
        if number not in self.packed:
            self.pack(number, self.read(number))
        content, shape = self.packed[number]
        return np.frombuffer(zlib.decompress(content), np.int16).reshape(shape)

    def pack(self, number: int, classes: np.ndarray) -> None:
        """Hold a mask ``[H, W]``, compressed."""
        self.packed[number] = zlib.compress(np.ascontiguousarray(classes, dtype=np.int16).tobytes(), 1), classes.shape

    def places(self, side: int, longest: int) -> npt.NDArray[np.int64]:
        """Return the pixel of a resized mask in which each of ``side`` pixels lies.

        ``longest`` is the mask's longer side.
        """
        extent = longest if self.square else side
        margin = (extent - side) // 2
        return (2 * (np.arange(side) + margin) + 1) * self.size // (2 * extent)


@dataclass(frozen=True, eq=False)
class FullMasks:
    """The masks of a split: those of a `MaskStore` at ``rows``, int64 ``[n]``."""

    store: MaskStore
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: Tensor) -> FullMasks:
        """Return the masks at ``indices``, int64 ``[m]``."""
        return FullMasks(self.store, self.rows[indices])

    def load_masks(self) -> FullMasks | None:
        """Return the same masks, held in memory, compressed.

        None where all have the size of the resized ones.

        Raises:
            UserError: a mask cannot be read, or holds a value that is no class.
        """
        numbers = sorted(set(self.rows.tolist()))

        def load(place: int) -> None:
            self.store.classes(numbers[place])

        each(load, len(numbers))
        sides = self.store.size, self.store.size
        return None if all(self.store.packed[number][1] == sides for number in numbers) else self

    def sizes(self) -> set[tuple[int, int]]:
        """Widths and heights of the data set's masks that are held in memory."""
        return {(shape[1], shape[0]) for _, shape in self.store.packed.values()}

    def __getitem__(self, index: int) -> tuple[Classes, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return a mask int16 ``[h, w]``, and the row and column of the network's mask for each of its own."""
        classes = self.store.classes(int(self.rows[index]))
        rows, columns = (self.store.places(side, max(classes.shape)) for side in classes.shape)
        return classes, rows, columns

    def overlaps(self, predicted: Tensor, first_row: int, classes: int) -> Tensor:
        """Pixel counts of images and classes (in both, predicted, true), int64 ``[B, 3, C]``.

        Args:
            predicted: int64 ``[B, h, w]``, the predicted class of every pixel that the network sees; it counts for all
                pixels of the full mask that lie in it.
            first_row: the row of the first image.
        """
        counts = np.zeros((len(predicted), 3, classes), dtype=np.int64)
        for row, guess in enumerate(predicted.cpu().numpy()):
            truth, rows, columns = self[first_row + row]
            valid = truth >= 0
            label, prediction = truth[valid], guess[rows[:, None], columns][valid]
            for part, values in enumerate((label[label == prediction], prediction, label)):
                counts[row, part] = np.bincount(values, minlength=classes)
        return torch.from_numpy(counts)
