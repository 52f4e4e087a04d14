"""Split in batches, for training, evaluation and methods. Samples of map-style data sets are read on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import default_collate

from fedkern.data.sources.items import Items, tensor_bytes
from fedkern.data.types import AnySplit
from fedkern.messages.leaves import move_to_device, split_targets
from fedkern.methods.protocol import OUTSIDE, Batch, Phase, batch_slices
from fedkern.streams import mix_words, seed_generators, seeded_generators, stream
from fedkern.tasks.retrieval import LOSS_BATCH

BATCH = 500
"""Samples per batch outside of training."""
Plan = Sequence[np.ndarray]
"""Rows of each batch of an epoch, int64."""


class Reader:
    """Samples of a split in batches (see :class:`fedkern.methods.protocol.Samples`), and their last evaluation.

    Attributes:
        fresh: whether inputs may differ between training epochs.
        predictions: predicted classes of the last evaluation, int64 [n] (segmentation: [n, H, W]), or None.
        kept: answers of the last keeping evaluation, each with the network's client (None: the run's network): logits
            [n, C], or the Dice of every class, fp64 [C].
        keep: adds to ``kept``; None outside a keeping evaluation.
        loss_batch: pairs per batch of a contrastive loss.
        pool: threads that evaluate batches side by side, or None.
        output_bytes: bytes of all outputs and targets, if a loss takes all at once, or 0.
        draws: whether an evaluation has moved a global random generator or changed buffers, so that none may run beside
            another.
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
    def joins(self) -> bool:
        """Return whether training may read batches joined: from memory, and with the same samples."""
        return not self.fresh

    @property
    def known_count(self) -> Tensor:
        """The number of known targets (samples, or pixels of a segmentation), at least 1."""
        raise NotImplementedError

    def make_batches(
        self, plan: Plan, phase: Phase = OUTSIDE, epoch: int = 0, rng: Generator | None = None, *, masked: bool = False
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch on demand, augmented by ``rng``, with object masks if ``masked``."""
        raise NotImplementedError

    def batch(self, indices: np.ndarray, phase: Phase = OUTSIDE, epoch: int = 0, rng: Generator | None = None) -> Batch:
        """Return the samples at ``indices`` (int64), augmented by ``rng``."""
        return next(self.make_batches([indices], phase, epoch, rng))

    def batches(
        self, size: int | None = None, *, even: bool = False, augment: bool = False, rng: Generator | None = None
    ) -> Iterator[Batch]:
        """Yield the samples in order, in batches of more than one (see ``batch_slices``), or of ``even`` sizes."""
        if augment and rng is None:
            raise ValueError("rng: expected a generator to augment with, given none")
        size, total = size or self.size, len(self)
        order = np.arange(total)
        parts = np.array_split(order, -(-total // size)) if even else map(order.__getitem__, batch_slices(total, size))
        for number, rows in enumerate(parts):
            batch = self.batch(rows, rng=rng if augment and self.fresh else None)
            if self._word is not None:
                seed_generators(mix_words(self._word, number), self.device)
            yield batch
        if self._word is not None:  # for a loss of all samples at once
            seed_generators(mix_words(self._word, -1), self.device)

    @contextmanager
    def repeating(self, seed: int, name: str, client: int = -1) -> Iterator[None]:
        """Seed an evaluation that draws from seed and set, and each batch from its number."""
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

    def record(self, predictions: Tensor) -> None:
        self.predictions = predictions.cpu()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        def keep(answer: Tensor, client: int | None = None) -> None:
            self.kept.append((client, answer))

        self.kept, self.keep = [], keep
        try:
            yield
        finally:
            self.keep = None


def batch_plan(samples: int, batch_size: int, rng: Generator) -> list[np.ndarray]:
    """Return one epoch's batches in random order, cut by ``batch_slices``.

    A client with fewer samples than the batch size has one smaller batch.
    """
    order = rng.permutation(samples)
    return [order[part] for part in batch_slices(samples, batch_size)]


BYTES = 1 << 26
"""Largest batch outside of training, in bytes."""


class ItemReader(Reader):
    """Reader of `fedkern.data.sources.items.Items`.

    An item's random draws begin at a word of seed, client (or -1), round, exchange, epoch and row, and in evaluation of
    seed, set and row. A collation has all rows of its batch instead of the row.
    """

    def __init__(self, split: Items, device: torch.device, *, seed: int, client: int = -1, size: int = BATCH) -> None:
        item_bytes = split.item_bytes or tensor_bytes(next(split.read([0], 0)))
        super().__init__(split, device, min(size, max(1, BYTES // max(1, item_bytes))))
        self.fresh = not split.is_deterministic or split.collate is not default_collate
        self._seed, self._client, self.reads = seed, client, 2
        self._targets: torch.Tensor | None = None

    @property
    def joins(self) -> bool:
        return bool(self.split.is_in_memory())

    @property
    def known_count(self) -> torch.Tensor:
        return torch.tensor(len(self))

    @property
    def labels(self) -> torch.Tensor:
        """Targets of all samples, from the last pass or else read now."""
        return self.split.labels if self._targets is None else self._targets.cpu()

    def batches(
        self, size: int | None = None, *, even: bool = False, augment: bool = False, rng: Generator | None = None
    ) -> Iterator[Batch]:
        seen = []
        for batch in super().batches(size, even=even, augment=augment, rng=rng):
            yield batch
            answers = batch.targets
            if isinstance(answers, torch.Tensor) and answers.dim() == 1:
                seen.append(answers)
        if seen:
            self._targets = torch.cat(seen)

    def make_batches(
        self,
        plan: Sequence[np.ndarray],
        phase: Phase = OUTSIDE,
        epoch: int = 0,
        rng: Generator | None = None,
        *,
        masked: bool = False,
    ) -> Iterator[Batch]:
        purpose = f"items/{phase.exchange}/{epoch}" if phase != OUTSIDE else f"items/{self.split.name}"
        word = int(stream(self._seed, purpose, round=phase.round, client=self._client).integers(2**63))
        for indices, batch in zip(plan, self.split.batches(plan, word, self.reads), strict=True):
            raw = move_to_device(batch, self.device)
            inputs, targets = split_targets(raw)
            yield Batch(
                inputs=inputs, targets=self.task.read_targets(targets), indices=indices, phase=phase, epoch=epoch,
                fresh=self.fresh, task=self.task, raw=raw,
            )  # fmt: skip


def trial_batch(split: Items, rows: Sequence[int]) -> Batch:
    """Return a batch before a run begins, reading each item at most once."""
    reader = ItemReader(split, torch.device("cpu"), seed=0)
    reader.reads = 1
    return next(reader.make_batches([np.asarray(rows, dtype=np.int64)]))
