"""Types that a method exchanges and trains on: rounds, messages, samples and batches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
from torch import Tensor

from fedkern.privacy.guarantee import IMAGE, Unit
from fedkern.streams import stream
from fedkern.tasks import CLASSIFICATION, Task

ClientId = int
Message = dict[str, Any]
"""Named tensors, numbers, and dicts of these; the byte ledger counts the tensors."""
Messages = Mapping[ClientId, Message]


@dataclass(frozen=True)
class Round:
    """One entry of a method's plan.

    Attributes:
        name: label in records and displays, for example ``"train"``, ``"level 2"`` or ``"calibrate"``.
        exchanges: names of the server -> clients -> server exchanges of the round, in order.
        participants: ``"sampled"`` (the engine's ``sample_fraction``), ``"all"``, or the ids of the participants.
        one_off: a set-up or closing round: its bytes are booked as one-off, and it is not one of the run's
            communication rounds.
        counted: False if the messages are the experimenter's bookkeeping rather than the method's communication; or the
            names of the exchanges that are communication.
        states: when the clients' states are written: after every ``"exchange"``, or once at the end of the ``"round"``
            (for rounds of many exchanges).
        cohort: whether all clients are computed together in the server's process (:meth:`Method.cohort_update`).
        trains: words for displays on what the round trains or sets up, such as ``"generator"``. Displays estimate the
            time left from rounds with equal words. Comparisons of rounds ignore the words.
    """

    name: str = "train"
    exchanges: tuple[str, ...] = ("update",)
    participants: Literal["sampled", "all"] | tuple[ClientId, ...] = "sampled"
    one_off: bool = False
    counted: bool | tuple[str, ...] = True
    states: Literal["exchange", "round"] = "exchange"
    cohort: bool = False
    trains: str = field(default="", compare=False)

    def counts(self, exchange: str) -> bool:
        """Return whether the messages of an exchange count as communication."""
        return exchange in self.counted if isinstance(self.counted, tuple) else self.counted


@dataclass(frozen=True)
class Phase:
    """Position of a call in the run.

    ``round`` counts from 0 and is negative for one-off rounds.
    """

    round: int
    name: str
    exchange: str


OUTSIDE = Phase(-1, "", "")
"""Phase of work outside every round: a batch that is not trained on, or a draw made once in a run."""
BEFORE = Phase(-1, "", "update")
"""Phase of draws before the rounds of a run: initial weights, a client's choice of teachers."""


@dataclass(frozen=True)
class Upload:
    """Upload of one client to the server.

    ``samples`` is the client's number of training samples.

    With client-level differential privacy a round has a single upload, the released mean of its clients: ``client_id``
    is -1, ``samples`` is 1, and ``share`` is the share of all clients that were asked. Else ``share`` is None.

    ``staleness`` is the number of steps that the server has taken since it sent the network that the client trained: 0
    in synchronous rounds.
    """

    client_id: ClientId
    samples: int
    message: Message
    share: float | None = None
    staleness: int = 0


@dataclass(frozen=True)
class Federation:
    """Sizes that a plan may depend on, without data.

    Attributes:
        rounds: communication rounds that the user asked for.
        samples: public number of training samples per client. With patients as the unit of privacy, the number of
            patients times the largest number of images of a patient.
        classes: number of classes.
        local_epochs: epochs per round (for one-shot methods a client's whole budget).
        unit: the unit of privacy.
        seed: the run's, see :meth:`rng`.
    """

    rounds: int
    samples: tuple[int, ...]
    classes: int
    local_epochs: int = 1
    unit: Unit = IMAGE
    seed: int = 0

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.samples)

    def rng(self, purpose: str) -> np.random.Generator:
        """Return a generator for the draws of a plan.

        The generator begins anew at every call, so that all plans of a run are equal: on a resume, and in every
        process.
        """
        return stream(self.seed, f"plan/{purpose}", round=-1)


class Backgrounds(Protocol):
    """Bank of training images with erased objects.

    Attributes:
        labels: int64 [N] (NumPy), the classes of the images that the backgrounds come from.
        augmented: whether :meth:`take` augments, so that the same index gives different images.
    """

    labels: np.ndarray
    augmented: bool

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray | None, rng: np.random.Generator | None = None) -> Tensor:
        """Return the images at ``indices`` (None: all), fp32 [B, C, H, W], normalised.

        Augmented if ``rng`` is given.
        """


@dataclass(frozen=True)
class Observed:
    """Summary of a scalar that clients reported over the run, a loss by its mean over a client's batches."""

    count: int
    mean: float
    low: float
    high: float


@dataclass
class Batch:
    """One mini-batch.

    Attributes:
        inputs: the network's inputs: images fp32 [B, C, H, W], augmented and normalised, on the client's device.
        targets: labels in the task's form, int64 [B] or [B, H, W] (negative: unknown) or uint8 [B, L]; for image-text
            pairs the tokenised texts (``fedkern.models.pretrained.vocabulary.Tokens``).
        indices: int64 [B] (NumPy), the samples' positions in the client's split.
        phase: the round and exchange that the batch is trained in.
        epoch: local epoch within the round, from 0.
        fresh: whether the same index gives other inputs in every epoch, as with augmented images.
        drawn: the results of the method's ``draw`` and ``prepare`` for this batch.
        per_sample: whether the loss must be a mean over samples of independent per-sample losses, as DP-SGD needs. A
            mean over all known pixels of the batch is not.
        raw: see ``data``.
        masks: bool [B, H, W], the pixels of ``inputs`` that are objects, augmented alike; only for methods that are
            ``masked``, else None.
        task: the run's task; ``batch.task.loss(model, batch)`` is its loss.
    """

    inputs: Any
    targets: Any
    indices: np.ndarray
    phase: Phase = OUTSIDE
    epoch: int = 0
    fresh: bool = False
    drawn: dict[str, Any] = field(default_factory=dict)
    per_sample: bool = False
    task: Task = CLASSIFICATION
    raw: Any = None
    masks: Tensor | None = None

    @property
    def data(self) -> Any:
        """The result of ``collate_fn`` on the device.

        For images the pair of inputs and targets.
        """
        return (self.inputs, self.targets) if self.raw is None else self.raw

    @property
    def known(self) -> Tensor | int:
        """The number of known targets: samples or, for a segmentation, pixels."""
        return self.task.count_known(self)

    def __iter__(self) -> NoReturn:
        raise TypeError("a batch cannot be unpacked: use batch.inputs and batch.targets")

    def __getattr__(self, name: str) -> NoReturn:
        named = {"images": "inputs", "labels": "targets", "tokens": "targets", "augmented": "fresh"}
        raise AttributeError(
            f"a batch has no {name}: expected one of {', '.join(vars(self))}"
            if name not in named
            else f"a batch has no {name}: say batch.{named[name]}"
        )


class Samples(Protocol):
    """Labelled images that a method iterates in order: a client's own, or the public split.

    Attributes:
        labels: int64 [n], or [n, H, W] for segmentation, on the CPU.
    """

    labels: Tensor

    def __len__(self) -> int: ...

    def batches(
        self, size: int = 500, *, augment: bool = False, rng: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        """Yield all samples in stored order, ``size`` at a time, normalised.

        Augmented only if ``augment``.

        The last batch may be smaller. A last batch of a single sample joins the batch before it, which then has ``size
        + 1`` samples, because batch norm in train mode cannot normalise a single value per channel. Batches of one
        sample occur only with ``size`` 1 or with a single sample in all.

        Raises:
            ValueError: ``augment`` without ``rng``.
        """

    def take(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """Return the images at ``indices``, fp32 [B, C, H, W], normalised.

        Augmented if ``rng`` is given.

        Augmentation moves pixel labels too; only `batches` returns the moved labels.
        """


class Received(Protocol):
    """Input of a client in this exchange, for ``loss`` and ``adjust_gradient``."""

    message: Message
    phase: Phase
    samples: int
    """Training samples of the client."""
    epochs: int
    """Local epochs of this exchange."""
    extras: Mapping[str, Any]
    """Values that the client prepared for its own training (``client.train(..., extras=)``), which never travel."""
    round_cache: dict[str, Any]
    """Cache that is dropped at the end of the client's exchange."""

    @property
    def model(self) -> Any:
        """The received network: a frozen copy in eval mode without gradients, built on first use.

        ``model`` and ``parameters`` exist only if the message holds a network as flat vectors.
        """

    @property
    def parameters(self) -> Tensor:
        """Parameters of the received network, fp32 [P], read only."""


def batch_slices(count: int, size: int) -> list[slice]:
    """Return slices of ``count`` samples in batches of ``size``.

    A last batch of one sample joins the batch before it, because batch norm cannot normalise a single value per
    channel.
    """
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1 and size > 1:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]
