"""Batches of a split as training and evaluation see them: images with labels and texts, backgrounds, test sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkern.data.pixels import PICK, Pixels, as_index, images_alone, placed
from fedkern.image_rows import loaded
from fedkern.methods.protocol import OUTSIDE, Batch, Phase, batch_slices
from fedkern.tasks import Task
from fedkern.tasks.retrieval import LOSS_BATCH
from fedkern.transfer import send

BATCH = 500
"""Images per batch where a network does not train."""

PICKED_BYTES = {"cuda": 1 << 26}
"""Bytes of images up to which batches are picked at once: on a GPU that takes no longer than for one batch."""

CACHE_BYTES = 1 << 30
"""Bytes up to which the normalised images of a whole run are kept in memory; beyond, every batch is normalised anew."""


class Samples:
    """Labelled images in stored order (see :class:`fedkern.methods.protocol.Samples`)."""

    def __init__(self, task: Task, pixels: Pixels, labels: Tensor, device: torch.device, tokens: Any = None) -> None:
        self.task = task
        self.pixels = pixels
        self._pick = PICK.get(task.network, images_alone)
        self.labels = labels
        self.tokens = tokens
        self.there = placed(labels, device)
        self._device = device

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        return self.pixels.take(indices, rng)

    def pairs(self, indices: np.ndarray | Tensor, rng: np.random.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels at ``indices``, augmented when ``rng`` is given; labels of pixels move with the images."""
        chosen, there = as_index(indices), self.there.device
        index = self.pixels.sent(chosen)
        own = index if index.device == there else send(chosen, there)
        labels = send(loaded(self.there.index_select(0, own)), self._device)
        return self._pick(self.pixels, index, labels, rng)

    def batch(
        self, indices: np.ndarray, phase: Phase = OUTSIDE, epoch: int = 0, rng: np.random.Generator | None = None
    ) -> Batch:
        """The samples at ``indices`` (int64); augmented when there is an ``rng``."""
        return next(self.planned([indices], phase, epoch, rng))

    def planned(
        self, plan: Sequence[np.ndarray], phase: Phase = OUTSIDE, epoch: int = 0, rng: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        """The batches of an epoch, made when they are asked for; their indices are sent to the device at once."""
        sent = self.pixels.sent(as_index(plan[0] if len(plan) == 1 else np.concatenate(plan)))
        sizes = [len(part) for part in plan]
        picked = PICKED_BYTES.get(self._device.type, 0) if rng is None else 0
        at_once = max(1, picked // max(1, max(sizes) * self.pixels.bytes_each))
        for first in range(0, len(plan), at_once):
            parts = slice(first, first + at_once)
            there, sent = sent.tensor_split([sum(sizes[parts])])
            images, labels = self.pairs(there, rng)
            pairs = zip(images.split(sizes[parts]), labels.split(sizes[parts]), strict=True)
            for indices, (own, known) in zip(plan[parts], pairs, strict=True):
                yield Batch(
                    inputs=own,
                    targets=self.task.targets(known, self.tokens, as_index(indices)),
                    indices=indices,
                    phase=phase,
                    epoch=epoch,
                    fresh=rng is not None,
                    task=self.task,
                )

    def batches(
        self, size: int = BATCH, *, augment: bool = False, rng: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        if augment and rng is None:
            raise ValueError("rng: expected a generator to augment with, given none")
        rng = rng if augment and self.pixels.augment != "none" else None
        for part in batch_slices(len(self), size):
            yield self.batch(np.arange(part.start, part.stop), rng=rng)


class BackgroundBank:
    """A background bank (see :class:`fedkern.methods.protocol.Backgrounds`)."""

    def __init__(self, pixels: Pixels, labels: np.ndarray) -> None:
        self.pixels = pixels
        self.labels = labels
        self.augmented = pixels.augment != "none"

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray | None, rng: np.random.Generator | None = None) -> Tensor:
        return self.pixels.take(indices, rng)


class ClientData:
    """Training data of a client: its split, labels and background bank."""

    def __init__(
        self,
        split: Any,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        augment: str,
        cache: bool,
        tokens: Any = None,
        sides: tuple[int, int] | None = None,
    ) -> None:
        self.split, self.augment, self._mean, self._std = split, augment, mean, std
        self._make_pixels = partial(Pixels, mean=mean, std=std, device=device, cache=cache, augment=augment)
        self.pixels = self._make_pixels(split.images, sides=sides)
        self.samples = Samples(split.task, self.pixels, split.labels, device, tokens)
        self.labels: Tensor = self.samples.there
        self._banks: dict[str, BackgroundBank] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def batch(
        self, indices: np.ndarray, phase: Phase = OUTSIDE, epoch: int = 0, rng: np.random.Generator | None = None
    ) -> Batch:
        """See :meth:`Samples.batch`."""
        return self.samples.batch(indices, phase, epoch, rng)

    def background_images(self) -> dict[str, Tensor]:
        """Images with a detected object, the object's pixels black: uint8 images, bool masks, int64 labels.

        Raises:
            ValueError: nothing is known about what is object and what is background.
        """
        found = self._detected()
        return {**found, "images": found["images"].masked_fill(found["masks"][:, None], 0)}

    def _detected(self) -> dict[str, Tensor]:
        """The images with a detected object, with their masks and labels."""
        split = self.split
        if split.masks is None:
            raise ValueError("masks: expected bool [n, H, W] for a background bank, given none")
        detected = split.masks.flatten(1).any(1)
        return {
            "images": split.images[detected],
            "masks": split.masks[detected],
            "labels": split.labels[detected],
        }

    def backgrounds(self, fill: str) -> BackgroundBank:
        """The client's own bank, made once."""
        if fill not in self._banks:
            self._banks[fill] = self.make_backgrounds(self._detected(), fill)
        return self._banks[fill]

    def make_backgrounds(self, message: Mapping[str, Tensor], fill: str) -> BackgroundBank:
        """Erases the objects and normalises; ``fill`` is ``"mean"`` (0 after normalisation) or ``"zero"`` (black)."""
        mean, std = torch.tensor(self._mean), torch.tensor(self._std)
        value = torch.zeros_like(mean) if fill == "mean" else -mean / std
        pixels = self._make_pixels(message["images"], erased=message["masks"], fill=value)
        return BackgroundBank(pixels, message["labels"].cpu().numpy())


class TestSet:
    """A named test set in batches; remembers the last predictions made on it.

    Attributes:
        predictions: predicted classes of the last evaluation, int64 [n] (segmentation: [n, H, W]), or None.
        kept: what the last evaluation that keeps handed on: a network's logits [n, C], or its Dice of every class, fp64
            [C], each with the network's client (None: the network is the run's).
        keep: adds to ``kept``; None outside an evaluation that keeps.
    """

    __test__ = False  # not a pytest class

    def __init__(
        self,
        split: Any,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        cache: bool,
        batch: int = BATCH,
        tokens: Any = None,
    ) -> None:
        self.split = split
        self.tokens = tokens
        self.loss_batch = LOSS_BATCH
        self.pixels = Pixels(split.images, mean, std, device, cache=cache)
        self.labels: Tensor = placed(split.labels, device)
        self._device = device
        self.task: Task = split.task
        self.cases: Tensor | None = split.cases
        self.full = None if split.full is None else split.full.loaded()  # read now: later the files may be gone
        self.batch = self.task.batch_size(batch, math.prod(split.images.shape[2:]))
        self.predictions: Tensor | None = None
        self.kept: list[tuple[int | None, Tensor]] = []
        self.keep: Callable[..., None] | None = None
        self.metrics: Sequence[Any] = ()  # the run's own metrics
        self.pool: ThreadPoolExecutor | None = None  # threads that evaluate its batches side by side, where there are

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, *, even: bool = False) -> Iterator[Batch]:
        """The samples in order, in batches of more than one (see ``batch_slices``), or of ``even`` sizes."""
        every = np.arange(len(self))
        parts = np.array_split(every, -(-len(self) // self.batch)) if even else map(every.__getitem__, self._slices)
        for rows in parts:
            images, there = self.pixels.take(rows), slice(int(rows[0]), int(rows[-1]) + 1)
            labels = send(loaded(self.labels[there]), self._device)
            yield Batch(images, self.task.targets(labels, self.tokens, as_index(rows)), rows, task=self.task)

    @property
    def _slices(self) -> list[slice]:
        return batch_slices(len(self), self.batch)

    def masked_batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first ``count`` images with their masks bool [B, H, W]."""
        for part in batch_slices(min(count, len(self)), self.batch):
            yield self.pixels.take(np.arange(part.start, part.stop)), self.split.masks[part]

    def record(self, predictions: Tensor) -> None:
        self.predictions = predictions.cpu()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, an evaluation keeps the networks' answers; what an earlier one kept is dropped."""

        def keep(answer: Tensor, client: int | None = None) -> None:
            self.kept.append((client, answer))

        self.kept, self.keep = [], keep
        try:
            yield
        finally:
            self.keep = None


def batch_plan(samples: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Batches of one epoch: the samples in random order, in batches as ``batch_slices`` makes them.

    A client with fewer samples than the batch size has one smaller batch.
    """
    order = rng.permutation(samples)
    return [order[part] for part in batch_slices(samples, batch_size)]
