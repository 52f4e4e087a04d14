"""Protocols of a task's inputs: batches, sets of samples, networks and runs."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

Words = dict[str, list[str] | list[int]]
"""Words of texts, and a client's counts."""
Label = Tensor | np.ndarray
"""A label of one sample."""
Description = Mapping[str, Any]
"""Facts for `Task.build`, in the form of the JSON in model.safetensors."""


class TaskBatch(Protocol):
    """Batch as a task reads it: `fedkern.methods.protocol.Batch`."""

    inputs: Any
    targets: Any
    indices: np.ndarray
    per_sample: bool

    @property
    def data(self) -> object: ...


class SampleSet(Protocol):
    """Samples with labels: a split, or a reader of a split."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...


class JudgedSet(SampleSet, Protocol):
    """Samples as an evaluation reads them: `fedkern.engine.batches.reader.Reader`."""

    split: Any
    loss_batch: int
    kept: list[tuple[int | None, Tensor]]

    def batches(self, *, even: bool = False) -> Iterator[TaskBatch]: ...


class Members(Protocol):
    """Module of the clients' own networks: `fedkern.models.Ensemble`."""

    @property
    def members(self) -> Iterable[nn.Module]: ...

    def logits(self, x: Tensor, /) -> Tensor: ...


class RunFacts(Protocol):
    """Facts of a run that describe its network: `fedkern.engine.context.RunContext`."""

    data: Any
    config: Any

    @property
    def task_facts(self) -> Description: ...
