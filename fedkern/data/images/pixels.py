"""Batches of a split's images as network inputs: normalised, channels-last, cached if small."""

import math

import numpy as np
import torch
from torch import Tensor

from fedkern.data.images import transforms
from fedkern.files.image_rows import ImageRows
from fedkern.process.device_copies import send

CACHE_BYTES = 1 << 30
"""Most bytes of a run's normalised images in memory; beyond, every batch is normalised anew."""


class Pixels:
    """Images [n, C, H, W] that become channels-last batches: normalised fp32, or unchanged if raw.

    Args:
        sides: height and width of the network's window, random for augmented images, else central.
        erased: bool [n, H, W], pixels that become ``fill`` (normalised, one value per channel).
    """

    def __init__(
        self,
        images: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        *,
        cache: bool,
        augment: str = "none",
        erased: Tensor | None = None,
        fill: Tensor | None = None,
        sides: tuple[int, int] | None = None,
        is_raw: bool = False,
    ) -> None:
        # Images in a file stay there, unless their normalised values are kept in memory.
        self._file = images if isinstance(images, ImageRows) and not cache else None
        # One row per image in NHWC, so that picking rows keeps channels-last and copies whole images.
        self._rows = images[:0] if self._file is not None else images.permute(0, 2, 3, 1).contiguous().to(device)
        self._count = len(images)
        self.bytes_each = 4 * math.prod(images.shape[1:])
        self._mean, self._std, self._device = mean, std, device
        self._erased = None if erased is None else erased.to(device)
        self._fill = torch.zeros(len(mean), device=device) if fill is None else fill.to(device)
        self.augment = augment
        self._cache, self._is_raw = cache, is_raw
        self._sides = None if sides == tuple(images.shape[2:]) else sides

    def __len__(self) -> int:
        return self._count

    def _normalise(self, rows: Tensor, erased: Tensor | None) -> Tensor:
        if rows.dtype == torch.uint8 and not self._is_raw:
            rows = transforms.normalise(rows.permute(0, 3, 1, 2), self._mean, self._std).permute(0, 2, 3, 1)
        return rows if erased is None else torch.where(erased[..., None], self._fill.to(rows.dtype), rows)

    def send_index(self, index: Tensor) -> Tensor:
        """Send indices to the images' device early, so that :meth:`take` need not."""
        return index if self._file is not None else send(index, self._device)

    def _whole(self, indices: np.ndarray | Tensor | None) -> Tensor:
        """Return images [B, C, H, W], channels-last and without window."""
        if self._cache and not self._is_raw and self._rows.dtype == torch.uint8:
            self._rows, self._erased = self._normalise(self._rows, self._erased), None
        rows, erased = self._rows, self._erased
        if (in_file := self._file) is not None:
            rows = in_file.permute(0, 2, 3, 1).contiguous() if indices is None else in_file.nhwc(as_index(indices))
            rows = send(rows, self._device)
        if indices is not None:
            index = send(as_index(indices), self._device)
            rows = rows if self._file is not None else rows.index_select(0, index)
            erased = None if erased is None else erased[index]
        return self._normalise(rows, erased).permute(0, 3, 1, 2)

    def take(self, indices: np.ndarray | Tensor | None, rng: np.random.Generator | None = None) -> Tensor:
        """Return images [B, C, H, W], channels-last, augmented if there is an ``rng``."""
        rng = None if self.augment == "none" else rng
        images = self._whole(indices)
        images = images if self._sides is None else transforms.window(images, self._sides, rng)
        return images if rng is None else transforms.augment(images, self.augment, rng)

    def with_labels(self, index: Tensor, labels: Tensor, rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """Return :meth:`take`'s images and unchanged ``labels``."""
        return self.take(index, rng), labels

    def pairs(self, index: Tensor, labels: Tensor, rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """Return :meth:`take`'s images and their pixel ``labels`` int64, transformed alike."""
        rng = None if self.augment == "none" else rng
        images = self._whole(index)
        if self._sides is not None:  # a window of both: class numbers are exact as a last channel
            stacked = torch.cat([images, labels[:, None].to(images.dtype)], 1)
            stacked = transforms.window(stacked, self._sides, rng)
            images, labels = stacked[:, :-1].contiguous(memory_format=torch.channels_last), stacked[:, -1].long()
        return (images, labels) if rng is None else transforms.augment_pairs(images, labels, self.augment, rng)


def as_index(indices: np.ndarray | Tensor) -> Tensor:
    return indices if isinstance(indices, Tensor) else torch.from_numpy(np.ascontiguousarray(indices))
