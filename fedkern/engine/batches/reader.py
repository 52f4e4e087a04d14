"""Reader: a split in batches, as training, evaluation and methods see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from fedkern.data.types import AnySplit
from fedkern.methods.protocol import OUTSIDE, Batch, Phase, batch_slices
from fedkern.streams import mix_words, seed_generators, seeded_generators, stream
from fedkern.tasks.retrieval import LOSS_BATCH

BATCH = 500
"""Samples per batch where a network does not train."""
Plan = Sequence[np.ndarray]
"""The samples of the batches of an epoch, int64."""


class Reader:
    """Samples of a split (see :class:`fedkern.methods.protocol.Samples`).

    Remembers the last evaluation on them.

    Attributes:
        fresh: whether a training epoch's batches may have other inputs than another epoch's.
        size: samples of a batch where nobody says a number.
        predictions: predicted classes of the last evaluation, int64 [n] (segmentation: [n, H, W]), or None.
        kept: what the last evaluation that keeps handed on: a network's logits [n, C], or its Dice of every class, fp64
            [C], each with the network's client (None: the network is the run's).
        keep: adds to ``kept``; None outside an evaluation that keeps.
        loss_batch: pairs per batch of a contrastive loss.
        metrics: the run's own metrics.
        pool: threads that evaluate batches side by side, where there are.
        output_bytes: bytes of a network's outputs and targets for all samples, where a loss takes them at once, or 0.
        draws: whether an evaluation has moved a global random generator or changed a network's buffers, so that none
            may run beside another.
    """

    fresh: bool
    labels: Any

    def __init__(self, split: AnySplit, device: torch.device, size: int = BATCH) -> None:
        self.split: Any = split
        self.task, self.device, self.size = split.task, device, size
        self.predictions: Tensor | None = None
        self.kept: list[tuple[int | None, Tensor]] = []
        self.keep: Callable[..., None] | None = None
        self.loss_batch = LOSS_BATCH
        self.metrics: Sequence[Any] = ()
        self.pool: ThreadPoolExecutor | None = None
        self.output_bytes = 0
        self.draws = False
        self._word: int | None = None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def known(self) -> Tensor:
        """Return how many targets are known, samples or, of a segmentation, pixels: a number of at least 1."""
        raise NotImplementedError

    def planned(
        self, plan: Plan, phase: Phase = OUTSIDE, epoch: int = 0, rng: Generator | None = None, *, masked: bool = False
    ) -> Iterator[Batch]:
        """Return the batches of an epoch, made when they are asked for.

        Images are augmented where there is an ``rng``.

        ``masked``: batches carry the objects' masks, which the images then have.
        """
        raise NotImplementedError

    def batch(self, indices: np.ndarray, phase: Phase = OUTSIDE, epoch: int = 0, rng: Generator | None = None) -> Batch:
        """Return the samples at ``indices`` (int64).

        Augmented when there is an ``rng``.
        """
        return next(self.planned([indices], phase, epoch, rng))

    def batches(
        self, size: int | None = None, *, even: bool = False, augment: bool = False, rng: Generator | None = None
    ) -> Iterator[Batch]:
        """Yield the samples in order, in batches of more than one (see ``batch_slices``), or of ``even`` sizes."""
        if augment and rng is None:
            raise ValueError("rng: expected a generator to augment with, given none")
        size, order = size or self.size, np.arange(len(self))
        parts = np.array_split(order, -(-len(self) // size)) if even else map(order.__getitem__, self.slices(size))
        for number, rows in enumerate(parts):
            batch = self.batch(rows, rng=rng if augment and self.fresh else None)
            if self._word is not None:
                seed_generators(mix_words(self._word, number), self.device)
            yield batch
        if self._word is not None:  # for what takes all samples at once
            seed_generators(mix_words(self._word, -1), self.device)

    @contextmanager
    def repeating(self, seed: int, name: str, client: int = -1) -> Iterator[None]:
        """Have an evaluation that draws begin at a word of seed and set, and each of its batches at a word of its own.

        Args:
            seed: the run's.
            name: of the set.
            client: the client that the set belongs to, or -1.
        """
        if not self.draws:
            yield
            return
        word = int(stream(seed, f"evaluation/{name}", client=client).integers(2**63))
        with seeded_generators(word, self.device):
            self._word = word
            try:
                yield
            finally:
                self._word = None

    def slices(self, size: int) -> list[slice]:
        """Return the samples of every batch of ``size``."""
        return batch_slices(len(self), size)

    def record(self, predictions: Tensor) -> None:
        self.predictions = predictions.cpu()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, an evaluation keeps the networks' answers.

        What an earlier one kept is dropped.
        """

        def keep(answer: Tensor, client: int | None = None) -> None:
            self.kept.append((client, answer))

        self.kept, self.keep = [], keep
        try:
            yield
        finally:
            self.keep = None


def batch_plan(samples: int, batch_size: int, rng: Generator) -> list[np.ndarray]:
    """Batches of one epoch: the samples in random order, in batches as ``batch_slices`` makes them.

    A client with fewer samples than the batch size has one smaller batch.
    """
    order = rng.permutation(samples)
    return [order[part] for part in batch_slices(samples, batch_size)]
