"""What a method exchanges and trains on: rounds, messages, samples and batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from fedkern.privacy.unit import IMAGE, Unit

ClientId = int
Message = dict[str, Any]
"""Named tensors, numbers, and dicts of such; its tensors are what the byte ledger counts."""


@dataclass(frozen=True)
class Round:
    """One entry of a method's plan.

    Attributes:
        name: for records and displays, for example ``"train"``, ``"level 2"`` or ``"calibrate"``.
        exchanges: names of the server -> clients -> server exchanges of the round, in order.
        participants: ``"sampled"`` (the engine's ``sample_fraction``), ``"all"``, or the ids of those that take part.
        one_off: a set-up round before training: its bytes are booked as one-off and it does not count as one of the
            run's communication rounds.
        booked: False where what moves is the experimenter's bookkeeping rather than the method's communication.
        states: when the clients' states are written: after every ``"exchange"``, or, in a round of many exchanges, once
            at the end of the ``"round"``.
        cohort: whether its clients are asked at once (:meth:`Method.cohort_update`), in the server's process, where
            that can be.
    """

    name: str = "train"
    exchanges: tuple[str, ...] = ("update",)
    participants: Literal["sampled", "all"] | tuple[ClientId, ...] = "sampled"
    one_off: bool = False
    booked: bool = True
    states: Literal["exchange", "round"] = "exchange"
    cohort: bool = False


@dataclass(frozen=True)
class Step:
    """Where in the run a call happens: ``round`` counts from 0 (negative for one-off rounds)."""

    round: int
    name: str
    exchange: str


OUTSIDE = Step(-1, "", "")
"""The step of a batch that is only looked at."""


@dataclass(frozen=True)
class Upload:
    """What one client sends to the server: ``samples`` is its number of training samples."""

    client_id: ClientId
    samples: int
    message: Message


@dataclass(frozen=True)
class Federation:
    """The sizes a plan may depend on; no data.

    Attributes:
        rounds: communication rounds the user asked for.
        samples: training samples per client, as everybody may know them: where patients are the unit of privacy, their
            number times the images that one may have.
        classes: number of classes.
        local_epochs: epochs per round (for one-shot methods a client's whole budget).
        unit: the unit of privacy.
    """

    rounds: int
    samples: tuple[int, ...]
    classes: int
    local_epochs: int = 1
    unit: Unit = IMAGE

    @property
    def clients(self) -> int:
        return len(self.samples)


class Backgrounds(Protocol):
    """A bank of training images whose objects are erased.

    Attributes:
        labels: int64 [N] (NumPy), the classes of the images the backgrounds come from.
        augmented: whether :meth:`take` augments, so that the same index gives different images.
    """

    labels: np.ndarray
    augmented: bool

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray | None, rng: np.random.Generator | None = None) -> Tensor:
        """The images at ``indices`` (None: all), fp32 [B, C, H, W], normalised; augmented when ``rng`` is given."""
        ...


@dataclass(frozen=True)
class Observed:
    """What is kept of a scalar observed by every client in every round (each value the mean over its batches)."""

    count: int
    mean: float
    low: float
    high: float


@dataclass
class Batch:
    """One mini-batch.

    Attributes:
        images: fp32 [B, C, H, W], augmented and normalised, on the client's device.
        labels: int64 [B], or [B, H, W] for segmentation (negative: unknown).
        indices: int64 [B], the samples' positions in the client's split (NumPy).
        step: the round and exchange it is trained in.
        epoch: local epoch within the round, from 0.
        augmented: whether the images were augmented, so that the same index gives different images.
        drawn: what the method's ``draw`` returned for this batch.
        tokens: the images' texts as the network takes them (``fedkern.models.vocabulary.Tokens``), or None.
        per_sample: whether the loss must be the mean over samples of losses that each has by itself, as DP-SGD needs
            it; a mean over all known pixels of the batch is not.
    """

    images: Tensor
    labels: Tensor
    indices: np.ndarray
    step: Step = OUTSIDE
    epoch: int = 0
    augmented: bool = False
    drawn: dict[str, Any] = field(default_factory=dict)
    tokens: Any = None
    per_sample: bool = False


class Samples(Protocol):
    """Labelled images that a method looks at in order: a client's own, or the public split.

    Attributes:
        labels: int64 [n], or [n, H, W] for segmentation, on the CPU.
    """

    labels: Tensor

    def __len__(self) -> int: ...

    def batches(
        self, size: int = 500, *, augment: bool = False, rng: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        """All of them in stored order, ``size`` at a time, normalised; augmented only when asked.

        The last batch is smaller, but never a single sample: that one joins the batch before it, which then has
        ``size + 1``, because a network in train mode cannot normalise a single value per channel.  Only a single sample
        in all, or ``size`` 1, gives batches of one.

        Raises:
            ValueError: ``augment`` without the ``rng`` that it draws from.
        """
        ...

    def take(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """The images at ``indices``, fp32 [B, C, H, W], normalised; augmented when ``rng`` is given.

        Labels of pixels, which augmentation moves too, come with `batches` alone.
        """
        ...


class Received(Protocol):
    """What a client got this exchange, as ``loss`` and ``adjust_gradient`` see it."""

    message: Message
    step: Step
    samples: int
    """Training samples of the client."""
    epochs: int
    """Local epochs of this exchange."""
    round_cache: dict[str, Any]
    """Vanishes at the end of the client's exchange."""

    @property
    def model(self) -> Any:
        """The network just received: a frozen copy in eval mode without gradients, built on first use.

        Like ``parameters`` it exists where the message holds a network as flat vectors.
        """
        ...

    @property
    def parameters(self) -> Tensor:
        """Its parameters, fp32 [P], read only."""
        ...


def batch_slices(count: int, size: int) -> list[slice]:
    """``count`` samples in consecutive batches of ``size``, the last one smaller.

    A last batch of a single sample joins the one before it, which then has ``size + 1``: batch norm cannot normalise a
    single value per channel.  Only ``count`` 1 and ``size`` 1 leave batches of one.
    """
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1 and size > 1:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]
