"""Images of a split in batches, and banks of their backgrounds."""

import math
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from fedkern.data.forms import ImageForm
from fedkern.data.images.pixels import Pixels, as_index
from fedkern.data.images.transforms import window
from fedkern.engine.batches.reader import BATCH, Plan, Reader
from fedkern.files.image_rows import FileRows, in_parts, load_rows
from fedkern.methods.protocol import OUTSIDE, Batch, Phase, batch_slices
from fedkern.process.device_copies import send

PICKED_BYTES = {"cuda": 1 << 26}
"""Bytes of images picked at once, which on a GPU takes no longer than picking one batch."""
_PICK = {"pixels": Pixels.pairs}
"""Methods that pick samples, by `fedkern.tasks.Task.network`; default: :meth:`Pixels.with_labels`."""


class BackgroundBank:
    """A background bank (see :class:`fedkern.methods.protocol.Backgrounds`)."""

    def __init__(self, pixels: Pixels, labels: np.ndarray) -> None:
        self.pixels = pixels
        self.labels = labels
        self.augmented = pixels.augment != "none"

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray | None, rng: Generator | None = None) -> Tensor:
        return self.pixels.take(indices, rng)


class Images(Reader):
    """Reader of a `fedkern.data.Split`."""

    def __init__(
        self,
        split: Any,
        form: ImageForm,
        device: torch.device,
        *,
        augment: str = "none",
        cache: bool = False,
        tokens: Any = None,
        size: int = BATCH,
    ) -> None:
        super().__init__(split, device, split.task.batch_size(size, math.prod(split.images.shape[2:])))
        self.form, self.tokens = form, tokens
        self._make_pixels = partial(
            Pixels, mean=form.mean, std=form.std, device=device, cache=cache, augment=augment, sides=form.shape[1:],
            is_raw=form.is_raw,
        )  # fmt: skip
        self.pixels = self._make_pixels(split.images)
        self._pick = _PICK.get(self.task.network, Pixels.with_labels)
        self.labels: Tensor = split.labels
        self._there = split.labels if isinstance(split.labels, FileRows) else split.labels.to(device)
        self.fresh = augment != "none"
        self.cases: Tensor | None = split.cases
        self.full = None if split.full is None else split.full.load_masks()  # read now, as the files may vanish later

    @property
    def known_count(self) -> Tensor:
        return torch.stack([(part >= 0).sum() for part in in_parts(self.split.labels)]).sum().clamp_min(1)

    def take(self, indices: np.ndarray, rng: Generator | None = None) -> Tensor:
        return self.pixels.take(indices, rng)

    def pairs(self, indices: np.ndarray | Tensor, rng: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return images and labels at ``indices``, augmented together when ``rng`` is given."""
        chosen = as_index(indices)
        index = self.pixels.send_index(chosen)
        return self._pick(self.pixels, index, self._labels(chosen, index), rng)

    def _labels(self, chosen: Tensor, index: Tensor) -> Tensor:
        label_index = index if index.device == self._there.device else send(chosen, self._there.device)
        return send(load_rows(self._there.index_select(0, label_index)), self.device)

    def _with_masks(self, chosen: Tensor, rng: Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        index = self.pixels.send_index(chosen)
        masks = self._masks.index_select(0, send(index, self.device)).long()
        images, moved = self.pixels.pairs(index, masks, rng)
        return images, self._labels(chosen, index), moved > 0  # padding is no object

    @cached_property
    def _masks(self) -> Tensor:
        masks: Tensor = self.split.masks.to(self.device)
        return masks

    def make_batches(
        self, plan: Plan, phase: Phase = OUTSIDE, epoch: int = 0, rng: Generator | None = None, *, masked: bool = False
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch on demand, with their indices sent to the device at once."""
        sent = self.pixels.send_index(as_index(plan[0] if len(plan) == 1 else np.concatenate(plan)))
        sizes = [len(part) for part in plan]
        picked = PICKED_BYTES.get(self.device.type, 0) if rng is None else 0
        at_once = max(1, picked // max(1, max(sizes) * self.pixels.bytes_each))
        for start in range(0, len(plan), at_once):
            parts = slice(start, start + at_once)
            chosen, sent = sent.tensor_split([sum(sizes[parts])])
            columns = self._with_masks(chosen, rng) if masked else self.pairs(chosen, rng)
            rows = zip(*(column.split(sizes[parts]) for column in columns), strict=True)
            for indices, (inputs, truth, *masks) in zip(plan[parts], rows, strict=True):
                yield Batch(
                    inputs=inputs,
                    targets=self.task.targets(truth, self.tokens, as_index(indices)),
                    indices=indices,
                    phase=phase,
                    epoch=epoch,
                    fresh=rng is not None,
                    task=self.task,
                    masks=masks[0] if masks else None,
                )

    def masked_batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in batch_slices(min(count, len(self)), self.size):
            masks = window(self.split.masks[part, None], self.form.shape[1:])[:, 0]
            yield self.pixels.take(np.arange(part.start, part.stop)), masks

    @cached_property
    def backgrounds(self) -> BackgroundBank:
        """The images with a detected object, erased to 0 after normalisation (middle grey of uint8 images).

        Raises:
            ValueError: the split has no object masks.
        """
        split = self.split
        if split.masks is None:
            raise ValueError("masks: expected bool [n, H, W] for a background bank, given none")
        detected = split.masks.flatten(1).any(1)
        value = torch.full((len(self.form.mean),), 128.0 * self.form.feeds_bytes)
        pixels = self._make_pixels(split.images[detected], erased=split.masks[detected], fill=value)
        return BackgroundBank(pixels, split.labels[detected].cpu().numpy())
