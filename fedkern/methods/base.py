"""The protocol of a federated method: what travels, and what each side makes of it.

A *round* has one or more named *exchanges* (server -> clients -> server); a *message* is a dict of named tensors and
numbers.  A method says nothing about where it runs: it never writes a file, prints, picks a device, draws from a global
generator or counts bytes.  The engine hands it a :class:`Server` and one :class:`Client` at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.methods.options import Options as BaseOptions
from fedkern.methods.options import option
from fedkern.methods.registry import METHODS, get, register

__all__ = [
    "METHODS",
    "Backgrounds",
    "Batch",
    "Client",
    "ClientId",
    "Federation",
    "LocalTraining",
    "Message",
    "Method",
    "Observed",
    "Received",
    "Round",
    "Server",
    "Step",
    "Upload",
    "get",
    "option",
    "register",
]  # fmt: skip

ClientId = int
Message = dict[str, Any]
"""Named tensors, numbers, and dicts of such; its tensors are what the byte ledger counts."""


@dataclass(frozen=True)
class Round:
    """One entry of a method's plan.

    Attributes:
        name: for records and displays, for example ``"train"`` or ``"calibrate"``.
        exchanges: names of the server -> clients -> server exchanges of the round, in order.
        participants: ``"sampled"`` (the engine's ``sample_fraction``) or ``"all"``.
        one_off: a set-up round before training: its bytes are booked as one-off and it does not count as one of the
            run's communication rounds.
    """

    name: str = "train"
    exchanges: tuple[str, ...] = ("update",)
    participants: Literal["sampled", "all"] = "sampled"
    one_off: bool = False


@dataclass(frozen=True)
class Step:
    """Where in the run a call happens: ``round`` counts from 0 (negative for one-off rounds)."""

    round: int
    name: str
    exchange: str


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
        samples: training samples per client.
        classes: number of classes.
        local_epochs: epochs per round (for one-shot methods a client's whole budget).
    """

    rounds: int
    samples: tuple[int, ...]
    classes: int
    local_epochs: int = 1

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
        labels: int64 [B].
        indices: int64 [B], the samples' positions in the client's split (NumPy).
        step: the round and exchange it is trained in.
        epoch: local epoch within the round, from 0.
        augmented: whether the images were augmented, so that the same index gives different images.
        drawn: what the method's ``draw`` returned for this batch.
    """

    images: Tensor
    labels: Tensor
    indices: np.ndarray
    step: Step
    epoch: int = 0
    augmented: bool = False
    drawn: dict[str, Any] = field(default_factory=dict)


class Received(Protocol):
    """What a client got this exchange, as ``loss`` and ``adjust_gradient`` see it."""

    message: Message
    step: Step
    samples: int
    """Training samples of the client."""
    epochs: int
    """Local epochs of this exchange."""
    scratch: dict[str, Any]
    """Vanishes at the end of the client's exchange."""

    @property
    def model(self) -> Any:
        """The network just received: a frozen copy in eval mode without gradients, built on first use."""
        ...

    @property
    def parameters(self) -> Tensor:
        """Its parameters, fp32 [P], read only."""
        ...


class Client(Protocol):
    """A client as its method sees it."""

    id: ClientId
    samples: int
    state: dict[str, Any]
    """Outlives the round; tensors, numbers, strings and dicts of such."""
    scratch: dict[str, Any]
    """Lives between the exchanges of a round and may vanish."""

    @property
    def objects_known(self) -> bool:
        """Whether anything is known about what is object and what is background in the client's images."""
        ...

    def train(self, method: LocalTraining, step: Step, message: Message) -> Message:
        """The engine's training loop: local epochs of SGD on ``method.loss`` from the received parameters.

        Returns ``{"parameters": fp32 [P], ...}`` with ``"buffers"`` fp32 [Q] and ``"integers"`` int64 [R] where the
        buffer policy lets them travel.
        """
        ...

    def backgrounds(self, fill: str = "mean") -> Backgrounds:
        """The client's own background bank; images without a detected object stay out of it."""
        ...

    def background_images(self) -> Message:
        """The same bank as it may travel.

        ``{"images": uint8 [N, C, H, W], "masks": bool [N, H, W], "labels": int64 [N]}``, objects black in ``images``.
        """
        ...

    def make_backgrounds(self, message: Mapping[str, Tensor], fill: str = "mean") -> Backgrounds:
        """Erases the objects of ``background_images`` of any client and normalises."""
        ...

    def rng(self, purpose: str, step: Step) -> np.random.Generator:
        """The client's own stream for a purpose and round."""
        ...

    def warn(self, name: str, text: str) -> None:
        """Adds a named diagnostic to the run's summary."""
        ...


class Server(Protocol):
    """The server as its method sees it."""

    federation: Federation
    state: dict[str, Any]
    scratch: dict[str, Any]

    def initial(self) -> Message:
        """A freshly initialised network as flat vectors, from the run's own stream."""
        ...

    def network(self, message: Message) -> nn.Module:
        """The network with these flat vectors, in eval mode; reused by later calls."""
        ...

    def accumulator(self, size: int) -> Any:
        """A streaming weighted mean over vectors of ``size`` elements."""
        ...


class Method:
    """A federated method; subclasses are registered with :func:`register`."""

    name: ClassVar[str] = ""
    description: ClassVar[str] = ""

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """The method's knobs."""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.Options() if options is None else options

    def check(self, client: Client) -> None:
        """Raises UserError where a client's data lack what the method needs; asked before anything is written."""

    def start(self, server: Server) -> None:
        """Fills ``server.state`` before the first round."""

    def rounds(self, federation: Federation) -> Iterator[Round]:
        """The plan: set-up rounds first (``one_off=True``), then the communication rounds."""
        for _ in range(federation.rounds):
            yield Round()

    def send(self, server: Server, step: Step) -> Message | dict[ClientId, Message]:
        """One message for all participants, or one for each (a dict whose keys are client ids)."""
        raise NotImplementedError

    def client_update(self, client: Client, step: Step, message: Message) -> Message:
        """What a client makes of a message, from its own data and state."""
        raise NotImplementedError

    def server_update(self, server: Server, step: Step, uploads: Iterable[Upload]) -> None:
        """What the server makes of the uploads; they arrive one by one and need not be kept."""
        raise NotImplementedError

    def model(self, server: Server) -> nn.Module:
        """The network that is evaluated and saved."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, data: Any) -> dict[str, float]:
        """Figures of ``model`` on a test set; ``data.batches()`` yields (images fp32, labels int64) in order.

        Returns ``accuracy`` and ``confidence`` (mean probability of the true class), fractions in [0, 1], and ``loss``
        (mean cross-entropy in nats).
        """
        from fedkern.methods.evaluate import classification

        return classification(model, data)

    def diagnose(self, observed: Mapping[str, Observed]) -> dict[str, str]:
        """Named one-sentence warnings from the run's observations (what ``loss`` returned beside the loss)."""
        return {}


class LocalTraining(Method):
    """Methods whose clients train the received network and whose server averages (FedAvg and what derives from it).

    The server's state is the global network as flat vectors: ``parameters`` fp32 [P], and, where the buffer policy lets
    them travel, ``buffers`` fp32 [Q] (running statistics) and ``integers`` int64 [R].
    """

    @dataclass(frozen=True)
    class Options(Method.Options):
        """Knobs of every locally training method."""

        weighting: str = option(
            "samples", "weight of a client in the average: its number of samples, or the same for all",
            choices=("samples", "uniform"),
        )  # fmt: skip

    def loss(self, model: Any, batch: Batch, received: Received) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The local objective of one batch, a scalar; optionally with named scalars whose mean is recorded."""
        raise NotImplementedError

    def draw(self, client: Client, batch: Batch, rng: np.random.Generator) -> dict[str, Any]:
        """Random draws that belong to a batch; what it returns becomes ``batch.drawn``."""
        return {}

    def adjust_gradient(self, parameters: Tensor, gradients: Tensor, received: Received) -> None:
        """Changes ``gradients`` [P] in place, after the backward pass and before the optimiser."""

    def start(self, server: Server) -> None:
        server.state.update(server.initial())

    def send(self, server: Server, step: Step) -> Message | dict[ClientId, Message]:
        return {name: server.state[name] for name in VECTORS if name in server.state}

    def client_update(self, client: Client, step: Step, message: Message) -> Message:
        return client.train(self, step, message)

    def server_update(self, server: Server, step: Step, uploads: Iterable[Upload]) -> None:
        uniform = self.options.weighting == "uniform"
        means: dict[str, Any] = {}
        integers: Tensor | None = None
        for upload in uploads:
            weight = 1.0 if uniform else float(upload.samples)
            for name in ("parameters", "buffers"):
                if name in upload.message:
                    if name not in means:
                        means[name] = server.accumulator(upload.message[name].numel())
                    means[name].add(upload.message[name], weight)
            if "integers" in upload.message:
                own = upload.message["integers"]
                integers = own.clone() if integers is None else torch.maximum(integers, own)
                del own
            del upload  # or it would live until the next one has arrived
        for name, mean in means.items():
            server.state[name] = mean.mean()
        if integers is not None:
            server.state["integers"] = integers

    def model(self, server: Server) -> nn.Module:
        return server.network({name: server.state[name] for name in VECTORS if name in server.state})


VECTORS = ("parameters", "buffers", "integers")
