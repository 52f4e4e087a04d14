"""Base classes of federated methods.

A *round* has one or more named *exchanges* (server -> clients -> server). A *message* is a dict of named tensors and
numbers. A method never writes a file, prints, picks a device, draws from a global generator or counts bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.methods.aggregators import Gathered
from fedkern.methods.options import Options as BaseOptions
from fedkern.methods.protocol import ClientId, Federation, Message, Messages, Observed, Phase, Round, Upload
from fedkern.methods.roles import Architecture, Client, Objective, Offering, Server, Summing, TestSet
from fedkern.methods.uploads import Declaration
from fedkern.privacy import Guarantee
from fedkern.typed_option import option

VECTORS = ("parameters", "buffers", "integers")
"""Flat vectors of a network in a message or state: fp32 [P], fp32 [Q], int64 [R], the last two if they travel."""


def vectors_of(message: Mapping[str, object]) -> Message:
    """Return the flat vectors of a network in a message or state."""
    return {name: message[name] for name in VECTORS if name in message}


VOUCHED: Mapping[str, tuple[tuple[str, ...], Any]] = {
    "averages": (("server_update", "average"), None),
    "reduce": (("server_update", "average", "weight"), ()),
    "asynchronous": (
        ("rounds", "send", "client_update", "cohort_update", "server_update", "average", "weight", "terms",
         "adjust_gradient"),
        None,
    ),
    "replayable": (("loss",), None),
}  # fmt: skip
"""Hooks that a flag of a class vouches for, and the flag's value if unknown."""


class Method:
    """Base class of federated methods.

    Subclasses are registered with :func:`register`.

    A one-shot method (``one_shot = True``) has its own plan: the user gives no number of rounds, and
    ``federation.local_epochs`` is a client's whole budget, to be divided over the plan.

    A pooled method (``pooled = True``) is not federated: a single client holds the data of all clients. The byte ledger
    counts one upload of every client's raw images and labels.

    The flags in `VOUCHED` vouch for hooks of the class that declares them. A subclass that overrides such a hook and
    does not declare the flag again loses the flag.
    """

    name: ClassVar[str] = ""
    description: ClassVar[str] = ""
    one_shot: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"loss", "criterion", "classes", "images"})
    """Requirements of the method on a task, among the words of `fedkern.tasks.Task.offers` (see :meth:`serves`).

    Not inherited: a subclass of another method that declares nothing has the requirements of this class."""

    may_skip_clients: ClassVar[bool] = False
    """Whether ``send`` may return a dict without some clients, or None for all."""
    pools_statistics: ClassVar[bool] = False
    """Whether ``server.state`` is a network as flat vectors, so that `fedkern.methods.common.pooling` can estimate the
    statistics of its batch norms."""
    follows_own_update: ClassVar[bool] = False
    """Whether a client's state follows from its whole update, so that the server must not scale the update down."""
    stateless: ClassVar[bool] = False
    """Whether clients keep no state between rounds, which the engine checks.

    Client-level differential privacy then uses amplification by the secret sampling of clients."""
    schedule_note: ClassVar[str] = ""
    """Notice for ``extend``: the parts of the method that follow a schedule over all rounds.  Empty: no part does."""
    averages: bool | None = False
    """Whether the server averages uploaded ``parameters``, so that ``--max-update-norm`` can bound updates. None:
    unknown for the class's own ``server_update`` or ``average``."""
    reduce: tuple[str, ...] = ()
    """Names of the vectors of an upload that ``server_update`` only passes to accumulators of the server.

    If clients work on a GPU, one after another, the vectors stay there, unless ``client_update`` is your own. With
    client-level differential privacy the vectors are clipped, and the server gets their noisy mean."""
    asynchronous: bool | None = False
    """Whether the server may step by stale uploads, of clients that began in different rounds (``--asynchronous``).
    None: unknown for the class's own hooks, which may count on whole rounds."""
    keeps_head: ClassVar[bool] = False
    """Whether every client keeps the network's last linear layer to itself, unless ``--personal`` names other parts."""
    ignored_settings: ClassVar[frozenset[str]] = frozenset()
    """Settings that have no effect because clients train once. A run refuses them, and `fedkern.compare` names them.

    A run detects other settings without effect itself."""
    takes_teachers: ClassVar[bool] = False
    """Whether clients may load trained networks (``--teachers``) instead of training locally."""

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Options of the method."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not isinstance(cls.reduce, tuple):
            raise TypeError(f"{cls.__name__}.reduce: expected a tuple of names, given {cls.reduce!r}")
        depth = {name: number for number, kind in reversed([*enumerate(cls.__mro__)]) for name in vars(kind)}
        for name, (hooks, unknown) in VOUCHED.items():
            # Functions that the inherited loss calls may compute on the host, too.
            called = getattr(getattr(cls, "loss", None), "__code__", None) if name == "replayable" else None
            parts = (*hooks, *(called.co_names if called else ()))
            if getattr(cls, name, None) and min(depth.get(part, depth[name]) for part in parts) < depth[name]:
                setattr(cls, name, unknown)

    def __init__(self, options: BaseOptions | None = None, **values: object) -> None:
        """Make the method.

        Args:
            options: an object of ``Options``; None: the defaults.
            **values: options by name instead, ``FedProx(mu=0.1)``.
        """
        name = type(self).__name__
        if options is not None and not isinstance(options, BaseOptions):
            raise UserError(
                f"{name} takes options by name, {name}(NAME=VALUE), or an object {name}.Options(...), not {options!r}."
            )
        if options is not None and values:
            raise UserError(f"{name} takes options by name or an object {name}.Options(...), not both: leave one out.")
        if options is None:
            options = self.Options.parse(values, method=name) if values else self.Options()
        self.options: Any = options

    @classmethod
    def serves(cls, data: Offering) -> bool:
        """Return whether a task, or data with their task, offer everything in ``requires``."""
        return bool(vars(cls).get("requires", Method.requires) <= data.offers)

    @property
    def needs(self) -> str:
        """The requirement on the run's network, one of four words.

        ``"logits"``, ``"features"`` (also ``features(images)`` and a ``head`` on them), ``"maps"`` (also ``stages`` and
        ``tail``) or ``"stages"`` (everything that a :class:`fedkern.models.StagedNetwork` has).

        A user's network without the required parts is refused before the run begins.
        """
        return "logits"

    @property
    def takes_personal(self) -> bool:
        """True if clients may keep parts of the network to themselves (``--personal``).

        Vectors of messages and of ``adjust_gradient`` and ``terms`` then have the length of the shared part.
        """
        return self.averages is not False and not self.one_shot

    @property
    def takes_buffers(self) -> bool:
        """True if ``--buffers`` controls the running statistics of the clients' batch norms."""
        return True

    @property
    def allows_server_rule(self) -> bool:
        """True if the server averages the whole network once a round, as ``--server-rule`` needs."""
        return self.averages is not False and not self.one_shot

    def architecture(self, client: ClientId) -> Architecture:
        """Return the arguments of ``Client.network`` for a client's network, trained or loaded.

        Empty: the run's network.
        """
        return {}

    def check(self, client: Client) -> None:
        """Raise UserError if a client's data do not fit the method.

        Called before anything is written.
        """

    def start(self, server: Server) -> None:
        """Fill ``server.state`` before the first round."""

    def rounds(self, federation: Federation) -> Iterator[Round]:
        """Yield the plan: set-up rounds first (``one_off=True``), then the communication rounds.

        The engine makes the plan several times in a run, and all plans must be equal: draw from ``federation.rng``.
        """
        for _ in range(federation.rounds):
            yield Round()

    def send(self, server: Server, phase: Phase) -> Message | dict[ClientId, Message] | None:
        """Return one message for all participants, or a dict of messages by client id.

        With ``may_skip_clients`` the dict may leave clients out, and None leaves all of them out.
        """
        raise NotImplementedError

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        """Return a client's answer to a message, made from the client's own data and state."""
        raise NotImplementedError

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        """Return the declaration of a client's upload (see `fedkern.methods.uploads`).

        The default: the tensors of the message that the client was sent.

        The engine checks the keys, shapes, dtypes and finite values of every upload before ``server_update`` sees the
        upload. An upload that does not fit is refused, and the reason names the client. If the method ``averages`` and
        the declaration has the broadcast tensor itself under ``parameters``, the difference between the uploaded and
        the broadcast tensor is the client's update.

        Args:
            server: the server; earlier uploads of this exchange may have changed its state.
            phase: the exchange.
            client: the uploading client.
            message: the message that the client was sent.
        """
        return {name: value for name, value in message.items() if isinstance(value, Tensor)}

    def cohort_update(self, clients: Mapping[ClientId, Client], phase: Phase, messages: Messages) -> Messages | None:
        """Return the answers of all clients of a ``cohort`` round, computed together.

        None asks the engine to call the clients one after another, in the same process.

        Args:
            clients: all participants of the round.
            messages: messages by recipient; participants without a message are left out.

        Returns:
            One answer for every recipient, or None.
        """
        return None

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        """Update the server's state from the uploads, which arrive one by one and need not be kept.

        Every upload fits the declaration of ``expects``. An upload is empty only if the declaration requires nothing.
        """
        raise NotImplementedError

    def model(self, server: Server) -> nn.Module | None:
        """Return the module that is evaluated (in eval mode) and saved.

        None while there is nothing to evaluate yet.

        Use only ``server.state``, ``server.build`` and ``server.network``, never ``round_cache`` or data:
        :meth:`fedkern.Run.model` calls this method too, on a run folder, and loads model.safetensors into the module.
        """
        raise NotImplementedError

    def vectors(self, server: Server) -> Message:
        """Return the flat vectors of the evaluated network, for methods with a single network."""
        return vectors_of(server.state)

    def weight(self, server: Server, upload: Upload) -> float:
        """Return a client's weight in the averages of a round.

        The weights need not sum to one.
        """
        return 1.0

    def statistics_at(self, entry: Round) -> int | None:
        """Return the index of the exchange before which batch norm's statistics are pooled.

        None: only before an evaluation.
        """
        return None

    def statistics_rows(self, client: Client) -> np.ndarray:
        """Return the indices, int64, of the client's samples for the pooled batch-norm statistics."""
        return np.arange(client.samples)

    def untrained(self, client: Client) -> np.ndarray:
        """Return the indices, int64, of samples that the local training never uses.

        Other parts of the method may use these samples.
        """
        return np.zeros(0, dtype=np.int64)

    def evaluate(self, model: nn.Module, data: TestSet) -> dict[str, float]:
        """Return the figures of ``model`` on a test set.

        ``data.batches()`` yields a :class:`Batch` at a time, in order.

        The engine may call this method from several threads, each with its own test set. An override that does not call
        ``super`` calls ``data.keep`` with the logits [n, C] of all samples on the CPU, if that attribute is not None:
        the figures of the run's end (AUROC, recall of every class ...) come from the logits. If every client has its
        own network, the override calls ``data.keep(logits, client=k)`` for each client.

        Returns:
            The figures of the task (``data.task.figures``), the main one first.
        """
        judged: Any = data  # a task reads more of a set than this protocol has
        return data.task.figures(model, judged)

    def own_vectors(self, client: Client, message: Message) -> Message:
        """Return the flat vectors of a client's network, from its state and the global network's in ``message``.

        A method that overrides this method is judged by its clients' networks: a figure of a test set is their mean.
        """
        return message

    def evaluate_own(self, model: nn.Module, data: TestSet, client: Client) -> dict[str, float]:
        """Return the figures, as :meth:`evaluate`, of a client's network on the client's own test set.

        Changes of ``client.state`` are dropped. If every client has its own network, ``model`` is that network, and the
        call is made where the client works. Otherwise the server makes the call, possibly from several threads; over
        Flower ``client.state`` is empty then, since nodes keep it.
        """
        return self.evaluate(model, data)

    def oracle_metrics(
        self, server: Server, clients: Mapping[ClientId, Client], sets: Mapping[str, TestSet]
    ) -> dict[str, float]:
        """Return figures that only a simulation can compute, because they need every client's data.

        The engine calls this method once at the end, for the run's summary, and counts no bytes. With private records
        (``--records``) the summary keeps only the ``derived_figures`` of the method's
        :class:`fedkern.privacy.Guarantee`, and no figure unless the guarantee covers every release.

        Args:
            sets: the test sets (see :meth:`evaluate`) by the prefix of their figures' names.
        """
        return {}

    def diagnose(self, observed: Mapping[str, Observed]) -> dict[str, str]:
        """Return named one-sentence warnings from the scalars that clients reported.

        The scalars are those of ``loss`` and ``client.report``.
        """
        return {}

    def guarantee(self, server: Server) -> Guarantee | None:
        """Return the method's differential-privacy guarantee: the releases that it covers, and the others.

        None without privacy options. Called after :meth:`start`.
        """
        return None

    @classmethod
    def is_private(cls, options: BaseOptions) -> bool:
        """Return whether the options ask for differential privacy, which makes ``--records`` private by default."""
        return cls.guarantee is not Method.guarantee


class LocalTraining(Objective, Method):
    """Base of methods whose clients train the received network and whose server averages (FedAvg and its variants).

    The server's state is the global network as flat vectors: ``parameters`` fp32 [P], and, if the buffer policy lets
    them travel, ``buffers`` fp32 [Q] (running statistics) and ``integers`` int64 [R].

    The server averages parameters and running statistics with the same weights, in fp64 and in client order
    (`fedkern.ops.Accumulator`). The mean of equal networks is that network. For ``num_batches_tracked`` the server
    takes the participants' largest value. Buffers that are not persistent, and running statistics of frozen batch
    norms, do not travel.

    A client's weight uses its declared number of samples. With ``--privacy-unit patient`` that is patients times images
    per patient.
    """

    @dataclass(frozen=True)
    class Options(Method.Options):
        """Options of every locally training method."""

        weighting: str = option(
            "samples",
            "weight of a client in the average: its number of samples, or equal weights",
            choices=("samples", "uniform"),
        )

    pools_statistics = True
    averages = True
    reduce: tuple[str, ...] = ("parameters", "buffers")

    def start(self, server: Server) -> None:
        server.state.update(server.initial())

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        return {name: server.state[name] for name in server.trained_vectors if name in server.state}

    def send(self, server: Server, phase: Phase) -> Message | dict[ClientId, Message]:
        return vectors_of(server.state)

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        return client.train(self, phase, message)

    def weight(self, server: Server, upload: Upload) -> float:
        return 1.0 if self.options.weighting == "uniform" else float(upload.samples)

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        server.state.update(self.average(server, uploads))

    def average(self, server: Server, uploads: Iterable[Upload]) -> Message:
        """Return the uploads' weighted means of ``parameters`` and ``buffers``, and the largest ``integers``.

        ``--aggregator`` replaces the mean by another rule. With ``--server-rule`` the parameters result from a step of
        a server optimiser from ``server.state["parameters"]`` towards the mean.
        """
        means: dict[str, Summing] = {}
        server.marks.update(("average", "server_step"))
        rule = getattr(server, "aggregator", None)  # a user-defined server may know only the mean
        gathered = None if rule is None else Gathered(rule)
        integers: Tensor | None = None
        for upload in uploads:
            weight = self.weight(server, upload)
            if gathered is not None:
                gathered.add(upload.message, weight)
            for name in ("parameters", "buffers") if gathered is None else ():
                if name in upload.message:
                    if name not in means:
                        means[name] = server.accumulator(upload.message[name].numel())
                    means[name].add(upload.message[name], weight)
            if "integers" in upload.message:
                counters = upload.message["integers"]
                integers = counters.clone() if integers is None else torch.maximum(integers, counters)
                del counters
            del upload  # free this upload before the next one arrives
        result = {name: mean.mean() for name, mean in means.items()} if gathered is None else gathered.result()
        optimiser = getattr(server, "optimiser", None)
        if optimiser is not None and "parameters" in result:
            result["parameters"] = optimiser.step(server.state, result["parameters"])
        return result if integers is None else {**result, "integers": integers}

    def model(self, server: Server) -> nn.Module:
        return server.network(self.vectors(server))
