"""Images of a split as training and evaluation see them: normalised, channels-last, cached where small."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkern.data import transforms
from fedkern.data.image_rows import FileRows, ImageRows, loaded
from fedkern.methods.base import OUTSIDE, Batch, Step
from fedkern.methods.common.supervised import LOSS_BATCH
from fedkern.methods.protocol import batch_slices
from fedkern.transfer import send

BATCH = 500
"""Images per batch where a network does not train."""

SEGMENTED_PIXELS = 1 << 19
"""Pixels per evaluation batch of a segmentation network; a batch may have one image more (see ``batch_slices``)."""

CACHE_BYTES = 1 << 30
"""Bytes up to which the normalised images of a whole run are kept in memory; beyond, every batch is normalised anew."""


class Pixels:
    """uint8 images [n, C, H, W] that become normalised fp32 batches, channels-last.

    ``sides`` (height, width), where given, is the window that a network sees: at a random place in an image that is
    augmented, else central.  ``erased`` bool [n, H, W], where given, marks pixels that become ``fill`` (normalised, one
    value per channel).
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
    ) -> None:
        # Images in a file stay there, unless their normalised values are kept in memory.
        self._file = images if isinstance(images, ImageRows) and not cache else None
        # One row per image in NHWC, so that picking rows keeps channels-last and copies whole images.
        self._rows = images[:0] if self._file is not None else images.permute(0, 2, 3, 1).contiguous().to(device)
        self._count = len(images)
        self._mean, self._std, self._device = mean, std, device
        self._erased = None if erased is None else erased.to(device)
        self._fill = torch.zeros(len(mean), device=device) if fill is None else fill.to(device)
        self.augment = augment
        self._cache = cache
        self._sides = sides or (int(images.shape[2]), int(images.shape[3]))

    def __len__(self) -> int:
        return self._count

    def _normalise(self, rows: Tensor, erased: Tensor | None) -> Tensor:
        out = transforms.normalise(rows.permute(0, 3, 1, 2), self._mean, self._std).permute(0, 2, 3, 1)
        return out if erased is None else torch.where(erased[..., None], self._fill, out)

    def _read(self, indices: np.ndarray | None) -> Tensor:
        """uint8 [B, H, W, C] on the device, of images in a file."""
        assert self._file is not None
        if indices is None:
            return send(self._file.permute(0, 2, 3, 1).contiguous(), self._device)
        return send(self._file.nhwc(torch.from_numpy(np.ascontiguousarray(indices))), self._device)

    def take(self, indices: np.ndarray | None, rng: np.random.Generator | None = None) -> Tensor:
        """fp32 [B, C, H, W] (channels-last) of the images at ``indices``; augmented when there is an ``rng``."""
        if self._cache and self._rows.dtype == torch.uint8:
            self._rows, self._erased = self._normalise(self._rows, self._erased), None
        rows, erased = self._rows, self._erased
        if self._file is not None:
            rows = self._read(indices)
        if indices is not None:
            index = send(torch.from_numpy(np.ascontiguousarray(indices)), self._device)
            rows = rows if self._file is not None else rows.index_select(0, index)
            erased = None if erased is None else erased[index]
        if rows.dtype == torch.uint8:
            rows = self._normalise(rows, erased)
        if self.augment == "none":
            rng = None
        images = transforms.window(rows.permute(0, 3, 1, 2), self._sides, rng)
        return images if rng is None else transforms.augment(images, self.augment, rng)


def placed(labels: Tensor, device: torch.device) -> Tensor:
    """Labels on the device; classes of pixels that are in a file stay there."""
    return labels if isinstance(labels, FileRows) else labels.to(device)


def take_tokens(tokens: Any, rows: np.ndarray, device: torch.device) -> Any:
    """The tokens, on the device, of the texts at ``rows`` (int64); None where there are no texts.

    All tokens stay on the CPU: the length of a batch's longest text is read from them, which nobody then waits for.
    """
    return None if tokens is None else tokens.take(torch.from_numpy(np.ascontiguousarray(rows))).to(device)


class Samples:
    """Labelled images in stored order (see :class:`fedkern.methods.base.Samples`)."""

    def __init__(self, pixels: Pixels, labels: Tensor, device: torch.device, tokens: Any = None) -> None:
        self.pixels = pixels
        self.labels = labels
        self.tokens = tokens
        self.there = placed(labels, device)
        self._device = device

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        return self.pixels.take(indices, rng)

    def pairs(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels at ``indices``, augmented when ``rng`` is given; labels of pixels move with the images."""
        index = send(torch.from_numpy(np.ascontiguousarray(indices)), self.there.device)
        labels = send(loaded(self.there[index]), self._device)
        if rng is None or labels.dim() < 3:
            return self.pixels.take(indices, rng), labels
        return transforms.augment_pairs(self.pixels.take(indices), labels, self.pixels.augment, rng)

    def batch(
        self, indices: np.ndarray, step: Step = OUTSIDE, epoch: int = 0, rng: np.random.Generator | None = None
    ) -> Batch:
        """The samples at ``indices`` (int64); augmented when there is an ``rng``."""
        images, labels = self.pairs(indices, rng)
        return Batch(
            images=images,
            labels=labels,
            indices=indices,
            step=step,
            epoch=epoch,
            augmented=rng is not None,
            tokens=take_tokens(self.tokens, indices, self._device),
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
    """A background bank (see :class:`fedkern.methods.base.Backgrounds`)."""

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
        self.samples = Samples(self.pixels, split.labels, device, tokens)
        self.labels: Tensor = self.samples.there
        self._banks: dict[str, BackgroundBank] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def batch(
        self, indices: np.ndarray, step: Step = OUTSIDE, epoch: int = 0, rng: np.random.Generator | None = None
    ) -> Batch:
        """See :meth:`Samples.batch`."""
        return self.samples.batch(indices, step, epoch, rng)

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
        segmented = self.labels.dim() == 3
        of_labels = {2: "multilabel", 3: "segmentation"}.get(self.labels.dim(), "classification")
        self.task = "retrieval" if tokens is not None else of_labels
        self.cases: Tensor | None = split.cases
        self.full = None if split.full is None else split.full.loaded()  # read now: later the files may be gone
        # A segmentation network has feature maps as large as its images, so its batches are smaller.
        self.batch = min(batch, max(1, SEGMENTED_PIXELS // split.images[0, 0].numel())) if segmented else batch
        self.predictions: Tensor | None = None
        self.kept: list[tuple[int | None, Tensor]] = []
        self.keep: Callable[..., None] | None = None
        self.metrics: Sequence[Any] = ()  # the run's own metrics
        self.pool: ThreadPoolExecutor | None = None  # threads that evaluate its batches side by side, where there are

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and their labels in order, in batches of more than one image (see ``batch_slices``)."""
        for part in batch_slices(len(self), self.batch):
            yield self.pixels.take(np.arange(part.start, part.stop)), send(loaded(self.labels[part]), self._device)

    def captioned(self) -> Iterator[tuple[Tensor, Any]]:
        """The images and the tokens of their texts, in batches of more than one pair (where there are two pairs)."""
        for rows in np.array_split(np.arange(len(self)), -(-len(self) // self.batch)):
            yield self.pixels.take(rows), take_tokens(self.tokens, rows, self._device)

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
