"""The protocol of a federated method: what travels, and what each side makes of it.

A *round* has one or more named *exchanges* (server -> clients -> server); a *message* is a dict of named tensors and
numbers.  A method says nothing about where it runs: it never writes a file, prints, picks a device, draws from a global
generator or counts bytes.  The engine hands it a :class:`Server` and one :class:`Client` at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.methods.options import Options as BaseOptions
from fedkern.methods.options import option
from fedkern.methods.protocol import (
    OUTSIDE,
    Backgrounds,
    Batch,
    ClientId,
    Federation,
    Message,
    Observed,
    Received,
    Round,
    Samples,
    Step,
    Upload,
)
from fedkern.methods.registry import METHODS, get, register
from fedkern.methods.roles import Client, Objective, Server
from fedkern.methods.uploads import Declaration, Maybe, Number, Values, like
from fedkern.privacy import Guarantee

VECTORS = ("parameters", "buffers", "integers")
"""A network as flat vectors in a message or state: fp32 [P], fp32 [Q], int64 [R]; the last two where they travel."""

__all__ = [
    "METHODS",
    "OUTSIDE",
    "VECTORS",
    "Backgrounds",
    "Batch",
    "Client",
    "ClientId",
    "Declaration",
    "Federation",
    "LocalTraining",
    "Maybe",
    "Message",
    "Method",
    "Number",
    "Objective",
    "Observed",
    "Received",
    "Round",
    "Samples",
    "Server",
    "Step",
    "Upload",
    "Values",
    "get",
    "like",
    "option",
    "register",
]  # fmt: skip


class Method:
    """A federated method; subclasses are registered with :func:`register`.

    A one-shot method (``one_shot = True``) has a plan of its own: the user gives no number of rounds, and
    ``federation.local_epochs`` is a client's whole budget, to be divided over the plan.

    A pooled method (``pooled = True``) is no federated one: the data of all clients are put together, booked as one
    upload of every client's raw images and labels, and a single client holds them.
    """

    name: ClassVar[str] = ""
    description: ClassVar[str] = ""
    one_shot: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    """What it can learn: ``"classification"``, ``"segmentation"``, ``"retrieval"`` (image-text pairs)."""

    selective: ClassVar[bool] = False
    """Whether ``send`` may leave out clients (a dict without them), or send nobody anything (None)."""
    pools_statistics: ClassVar[bool] = False
    """Whether ``server.state`` is a network as flat vectors, whose statistics `fedkern.methods.common.pooling` can
    estimate."""
    takes_teachers: ClassVar[bool] = False
    """Whether the clients may bring trained networks (``--teachers``) in the place of their local training."""

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """The method's knobs."""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.Options() if options is None else options

    @property
    def averages(self) -> bool:
        """Whether the server averages uploaded ``parameters``, whose update can be bounded (``--max-update-norm``)."""
        return False

    def architecture(self, client: ClientId) -> dict[str, Any]:
        """What ``Client.network`` needs beside the run's settings for the network that a client trains, or brings."""
        return {}

    def check(self, client: Client) -> None:
        """Raises UserError where a client's data lack what the method needs; asked before anything is written."""

    def start(self, server: Server) -> None:
        """Fills ``server.state`` before the first round."""

    def rounds(self, federation: Federation) -> Iterator[Round]:
        """The plan: set-up rounds first (``one_off=True``), then the communication rounds."""
        for _ in range(federation.rounds):
            yield Round()

    def send(self, server: Server, step: Step) -> Message | dict[ClientId, Message] | None:
        """One message for all participants, or one for each (a dict whose keys are client ids)."""
        raise NotImplementedError

    def client_update(self, client: Client, step: Step, message: Message) -> Message:
        """What a client makes of a message, from its own data and state."""
        raise NotImplementedError

    def expects(self, server: Server, step: Step, client: ClientId, message: Message) -> Declaration:
        """What a client's upload must hold (see `fedkern.methods.uploads`); by default the tensors that it was sent.

        The engine checks every upload before ``server_update`` sees it: keys, shapes, dtypes, finite values.  What does
        not fit is refused, and the client named.  Where the declaration has the broadcast tensor itself under
        ``parameters`` and the method ``averages``, the difference to that tensor is the client's update.

        Args:
            server: its state as the uploads before this one have left it.
            step: the exchange.
            client: whose upload.
            message: what the client was sent.
        """
        return {name: value for name, value in message.items() if isinstance(value, Tensor)}

    def cohort_update(
        self, clients: Mapping[ClientId, Client], step: Step, messages: Mapping[ClientId, Message]
    ) -> Mapping[ClientId, Message] | None:
        """What the clients of a round that is for a ``cohort`` make of their messages at once.

        None: ask them one after another, in the same process.

        Args:
            clients: all that take part in the round.
            messages: of those that are sent one; every one of them is answered.
        """
        return None

    def server_update(self, server: Server, step: Step, uploads: Iterable[Upload]) -> None:
        """What the server makes of the uploads; they arrive one by one and need not be kept.

        They are as ``expects`` declares them, and none is empty unless nothing is expected.
        """
        raise NotImplementedError

    def model(self, server: Server) -> nn.Module | None:
        """The module that is evaluated (in eval mode) and saved; None while there is nothing to evaluate yet.

        It is made of ``server.state``, ``build`` and ``network`` alone, never of ``round_cache`` or data:
        ``engine.read_model`` calls it too, on a run folder, and loads model.safetensors into what it returns.
        """
        raise NotImplementedError

    def vectors(self, server: Server) -> Message:
        """The network that is evaluated as flat vectors, where there is one network."""
        return {name: server.state[name] for name in VECTORS if name in server.state}

    def weight(self, server: Server, upload: Upload) -> float:
        """The weight of a client in the averages of a round, which need not sum to one."""
        return 1.0

    def statistics_at(self, entry: Round) -> int | None:
        """Before which exchange of a round the network's statistics are needed; None: only where it is evaluated."""
        return None

    def statistics_rows(self, client: Client) -> np.ndarray:
        """The samples that they are taken over, int64."""
        return np.arange(client.samples)

    def untrained(self, client: Client) -> np.ndarray:
        """The client's samples, int64, that the method keeps from the local training, whatever else looks at them."""
        return np.zeros(0, dtype=np.int64)

    def evaluate(self, model: nn.Module, data: Any) -> dict[str, float]:
        """Figures of ``model`` on a test set; ``data.batches()`` yields (images fp32, labels int64) in order.

        Returns ``accuracy`` and ``confidence`` (mean probability of the true class), fractions in [0, 1], and ``loss``
        (mean cross-entropy in nats); of image-text pairs the figures of `fedkern.methods.common.supervised`, ``i2t_r1``
        first; of a segmentation those of `fedkern.methods.common.segmentation_figures`, ``dice`` first.

        The engine asks for several test sets at once, from threads.
        """
        from fedkern.methods.common.figures import figures

        return figures(model, data)

    def evaluate_own(self, model: nn.Module, data: Any, client: ClientId) -> dict[str, float]:
        """The same on the client's own test set: of the network that this client would use."""
        return self.evaluate(model, data)

    def oracle_metrics(
        self, server: Server, clients: Mapping[ClientId, Client], sets: Mapping[str, Any]
    ) -> dict[str, float]:
        """Figures for the run's summary that only the experimenter can see, who looks at every client.

        Asked once at the end; nothing of it is booked.  With private records those alone are told that the method's
        :class:`fedkern.privacy.Guarantee` names as ``appraised``, where it covers everything.

        Args:
            sets: the test sets (see :meth:`evaluate`) by the prefix that their figures' names begin with.
        """
        return {}

    def diagnose(self, observed: Mapping[str, Observed]) -> dict[str, str]:
        """Named one-sentence warnings from the run's observations (what ``loss`` returned beside the loss)."""
        return {}

    def guarantee(self, server: Server) -> Guarantee | None:
        """What its differential privacy covers and what not; None where the options ask for none.

        Asked after :meth:`start`.
        """
        return None

    @classmethod
    def promises(cls, options: Any) -> bool:
        """Whether the options ask for differential privacy of anything, so that ``--records`` is private by default."""
        return cls.guarantee is not Method.guarantee


class LocalTraining(Objective, Method):
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

    pools_statistics = True

    @property
    def averages(self) -> bool:
        return True

    def start(self, server: Server) -> None:
        server.state.update(server.initial())

    def expects(self, server: Server, step: Step, client: ClientId, message: Message) -> Declaration:
        return {name: server.state[name] for name in server.trained_vectors if name in server.state}

    def send(self, server: Server, step: Step) -> Message | dict[ClientId, Message]:
        return {name: server.state[name] for name in VECTORS if name in server.state}

    def client_update(self, client: Client, step: Step, message: Message) -> Message:
        return client.train(self, step, message)

    def weight(self, server: Server, upload: Upload) -> float:
        return 1.0 if self.options.weighting == "uniform" else float(upload.samples)

    def server_update(self, server: Server, step: Step, uploads: Iterable[Upload]) -> None:
        server.state.update(self.average(server, uploads))

    def average(self, server: Server, uploads: Iterable[Upload]) -> Message:
        """The weighted means of the uploads' ``parameters`` and ``buffers``, and the largest of their ``integers``."""
        means: dict[str, Any] = {}
        integers: Tensor | None = None
        for upload in uploads:
            weight = self.weight(server, upload)
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
        result = {name: mean.mean() for name, mean in means.items()}
        return result if integers is None else {**result, "integers": integers}

    def model(self, server: Server) -> nn.Module:
        return server.network(self.vectors(server))
