"""Samples of a map-style data set in batches, read on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.random import Generator
from torch.utils.data import default_collate

from fedkern.data.sources.items import Items, tensor_bytes
from fedkern.engine.batches.reader import BATCH, Reader
from fedkern.messages.leaves import move_to_device, split_targets
from fedkern.methods.protocol import OUTSIDE, Batch, Phase
from fedkern.streams import stream

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
