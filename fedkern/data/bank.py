"""The background bank: a client's own images with their objects erased (FedGID, arXiv 2504.00850; method notes 1.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkern.data.background import BackgroundStatistics, background_statistics
from fedkern.data.transforms import normalise
from fedkern.data.types import Split
from fedkern.errors import UserError

Rows = npt.NDArray[np.int64]


class BackgroundBank:
    """Random backgrounds of one split; images without a detected object are not in it.

    Args:
        split: a training split with masks.
        mean, std: per channel, of images in [0, 1].
        fill: what an erased pixel becomes: ``"mean"``, exactly 0 after normalisation, or ``"zero"``, a black pixel.

    Attributes:
        indices: int64, rows of the split that are in the bank.
        statistics: how many images were detected.
    """

    def __init__(self, split: Split, mean: Sequence[float], std: Sequence[float], *, fill: str = "mean") -> None:
        if fill not in ("mean", "zero"):
            raise ValueError(f'fill: expected "mean" or "zero", got {fill!r}')
        if split.masks is None:
            raise UserError(
                "a background bank needs object masks and this data set has none; give a boxes file or a detector"
            )
        self._split, self._masks = split, split.masks
        self._mean, self._std, self._fill = tuple(mean), tuple(std), fill
        self.statistics: BackgroundStatistics = background_statistics(split)
        self.indices: Rows = np.flatnonzero(split.masks.flatten(1).any(dim=1).numpy())
        labels = split.labels.numpy()[self.indices]
        self._by_class = self.indices[np.argsort(labels, kind="stable")]
        self._sorted_labels = np.sort(labels, kind="stable")

    def __len__(self) -> int:
        return len(self.indices)

    def draw(
        self,
        rng: np.random.Generator,
        count: int,
        *,
        labels: Rows | None = None,
        exclude_same_class: bool = False,
    ) -> Rows:
        """Draws ``count`` rows of the split uniformly from the bank, with replacement.

        Args:
            labels: int64 ``[count]``, the classes of the samples that get these backgrounds.
            exclude_same_class: never draw a background that comes from an image of the sample's own class.

        Raises:
            ValueError: an empty bank, or ``labels`` missing or of another length.
            UserError: the bank holds no background of another class.
        """
        if len(self) == 0:
            raise ValueError("the background bank is empty: no image has a detected object")
        if not exclude_same_class:
            return self.indices[rng.integers(0, len(self), size=count)]
        if labels is None or len(labels) != count:
            raise ValueError(f"labels: expected {count} classes with exclude_same_class")
        first = np.searchsorted(self._sorted_labels, labels, side="left")
        own = np.searchsorted(self._sorted_labels, labels, side="right") - first
        allowed = len(self) - own
        if count and int(allowed.min()) == 0:
            raise UserError(
                f"all {len(self)} backgrounds of a client come from one class, so exclude_same_class leaves none; "
                "turn it off or take another partition"
            )
        position = rng.integers(0, allowed)
        return self._by_class[np.where(position >= first, position + own, position)]

    def images(self, indices: Rows | Tensor, *, channels_last: bool = False) -> Tensor:
        """The images at rows ``indices`` of the split, normalised float32 ``[B, C, H, W]``, objects erased."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        masks = self._masks[rows].unsqueeze(1)
        if self._fill == "mean":
            return normalise(self._split.images[rows], self._mean, self._std, channels_last=channels_last).masked_fill_(
                masks, 0.0
            )
        black = self._split.images[rows].masked_fill_(masks, 0)
        return normalise(black, self._mean, self._std, channels_last=channels_last)
