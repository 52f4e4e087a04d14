"""Interfaces between a method and the engine: the client, the server, and the objective that the engine trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.methods.aggregators import Rule
from fedkern.methods.protocol import Backgrounds, Batch, ClientId, Federation, Message, Phase, Received, Samples
from fedkern.methods.server_rules import ServerRule
from fedkern.methods.terms import Terms
from fedkern.privacy import DPSGD, Unit
from fedkern.tasks import Task
from fedkern.tasks.protocols import JudgedSet

Drawn = dict[str, Any]
"""Draws and inputs that a method prepares for a batch, by name: tensors, numbers, a bank of backgrounds."""


class Architecture(TypedDict, total=False):
    """Arguments of ``Client.network``: a network's name, and the channels of its first stage."""

    model: str | None
    width: int | None


class Offering(Protocol):
    """Task, or data with their task."""

    @property
    def offers(self) -> frozenset[str]: ...


class TestSet(Protocol):
    """Samples for an evaluation, in batches with known targets."""

    @property
    def task(self) -> Task: ...

    def __len__(self) -> int: ...

    def batches(self) -> Iterator[Batch]: ...


class EvaluatedSet(JudgedSet, Protocol):
    """Test set of the run, with the answers of its last evaluation (`fedkern.engine.batches.reader.Reader`).

    Attributes:
        kept: pairs of a network's client (None: the run's network) and answers.
        predictions: predicted classes, int64 [n] (segmentation: [n, H, W]), or None.
    """

    predictions: Tensor | None
    metrics: Sequence[Any]

    @property
    def task(self) -> Task: ...


class Objective:
    """Interface that the engine's training loop calls: the loss, its random draws and changes to the gradient."""

    replayable: bool | None = None
    """Whether a recording of ``loss`` and its gradients is valid for other batches (`engine/local/captured.py`).

    The loss then may depend on the network, on the batch's ``inputs``, ``targets`` and the tensors and numbers in
    ``drawn``, on the method's options and on the parts of ``received`` that stay the same in the exchange. It reads no
    value of a tensor on the host, and neither ``batch.indices`` nor ``epoch`` nor ``phase`` (``received.phase`` is the
    same); it draws nothing but from torch's global generator, and changes no state of Python. The flag is about the
    ``loss`` of the class that declares the flag. None: unknown, and recorded steps are compared with eager ones."""

    @property
    def masked(self) -> bool:
        """True if training batches carry the objects' ``masks``.

        The client's images then must have masks.
        """
        return False

    def loss(self, model: Any, batch: Batch, received: Received) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the local objective of one batch, a scalar, by default the task's loss.

        Optionally with a dict of named scalars, whose means are recorded.
        """
        return batch.task.loss(model, batch)

    def draw(self, client: Client, batch: Batch, rng: np.random.Generator) -> Drawn:
        """Return random draws for a batch, which become ``batch.drawn``."""
        return {}

    def prepare(self, model: Any, batch: Batch, received: Received) -> Drawn:
        """Return inputs of the loss beside the trained network, by name, such as a frozen network's outputs.

        Called before ``loss``, without gradients; the result joins ``batch.drawn``.
        """
        return {}

    def terms(self, received: Received) -> Terms | None:
        """Return the terms added to the gradient of every step of the exchange.

        Called once, before the first step.
        """
        return None

    def adjust_gradient(self, parameters: Tensor, gradients: Tensor, received: Received) -> None:
        """Change ``gradients`` [P] in place, after the backward pass and before the optimiser.

        Override this method for changes that :meth:`terms` cannot express. The default adds the terms; an override
        replaces them.
        """
        terms = self.terms(received)
        if terms is not None:
            terms.add_to(gradients, parameters)


class Node(Protocol):
    """Base of client and server.

    Attributes:
        image_shape: channels, height and width of a network's input.
        mean, std: per channel, of images in [0, 1].
        public: public labelled images, which no client holds (``--public-samples``), or None.
    """

    device: torch.device
    task: Task
    classes: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...

    @property
    def public(self) -> Samples | None: ...

    def noise(self, samples: int, rng: np.random.Generator) -> object:
        """Return normally distributed inputs of a network, on the device."""

    def rng(self, purpose: str, phase: Phase) -> np.random.Generator:
        """Return the node's own random stream for a purpose, round and exchange."""

    def warn(self, name: str, text: str) -> None: ...

    def notice(self, text: str) -> None:
        """Show progress to the user at once, without storing the text."""


class Client(Node, Protocol):
    """Interface of a client to its method.

    Attributes:
        label: the client in messages: its number and, if the data name clients, its name, ``1 (Berlin)``.
        samples: number of training samples, n.
        declared: public number of training samples (``Federation.samples``), for weights and schedules.
        labels: int64 [n], or [n, H, W] for segmentation, on the CPU. Samples other than images have no labels.
        known: number of known targets, samples or, for a segmentation, pixels.
        state: kept from round to round: tensors, numbers, strings and dicts of these, read back on the CPU. A private
            method keeps the ``state`` of the client's :class:`fedkern.privacy.Accountant` under
            ``fedkern.privacy.LEDGER``. The names ``personal``, ``buffers_local`` and ``encoders`` are taken.
        round_cache: kept between the exchanges of a round and dropped after the round.
        report: figures of the client in the round's record: numbers under names other than
            ``clipped``, ``name``, ``samples``, ``seconds``, ``staleness`` and ``update_norm``.
    """

    id: ClientId
    label: str
    samples: int
    declared: int

    @property
    def labels(self) -> Tensor:
        """Targets of all training samples in their order, int64 [n] for classes."""

    @property
    def known(self) -> Tensor:
        """Number of known targets (samples or, of a segmentation, pixels), an int64 scalar of at least 1."""

    state: dict[str, Any]
    round_cache: dict[str, Any]
    report: dict[str, float]

    @property
    def groups(self) -> np.ndarray | None:
        """The group of every sample (patient, case or image), int64 [n], counted from 0.

        None if every sample is its own group.

        A client that holds out samples must hold out whole groups.
        """

    @property
    def patients(self) -> np.ndarray | None:
        """The patient of every sample, int64 [n], counted from 0.

        None unless patients are the unit of privacy.
        """

    @property
    def unit(self) -> Unit:
        """The unit of privacy."""

    @property
    def own_buffers(self) -> Message:
        """The buffers that training left at the client (``--buffers local``), or an empty dict."""

    @property
    def objects_known(self) -> bool:
        """True if the client's images have object masks."""

    def network(
        self,
        *,
        model: str | None = None,
        width: int | None = None,
        classes: int | None = None,
        stream: str | None = None,
    ) -> Any:
        """Return a freshly initialised network, in train mode, channels-last, on ``device``.

        The run's random stream gives the initial weights, the same at every client and every call. With ``stream``, the
        client's own stream of that name gives them: the same at every call, but different between clients.

        Args:
            model: name of another architecture than the run's.
            width: channels of the first stage (default: the run's width, or the default of ``model``).
            classes: number of outputs.
            stream: name of the client's stream for its own initial weights.

        Raises:
            UserError: there is no such network.
        """

    def train(
        self,
        method: Objective,
        phase: Phase,
        message: Message,
        *,
        parts: Sequence[str] | None = None,
        steps: int | None = None,
        rows: np.ndarray | None = None,
        anchor: Message | None = None,
        extras: Mapping[str, object] | None = None,
    ) -> Message:
        """Run the engine's training loop: local epochs on ``method.loss`` from the received parameters.

        Args:
            parts: names of the submodules to train, which must be adjacent in the network's vectors. The other
                submodules keep their values and stay in eval mode; ``method.loss`` must not send gradients into them.
            steps: optimiser steps instead of the run's local budget.
            rows: int64, the samples to train on; None for all.
            anchor: flat vectors of ``received.model``, if that differs from the network that training starts from.
            extras: the mapping that the method's ``loss``, ``terms`` or ``adjust_gradient`` finds in
                ``received.extras``.

        Returns:
            ``{"parameters": fp32 [P], ...}`` with ``"buffers"`` fp32 [Q] and ``"integers"`` int64 [R] if the buffer
            policy lets them travel; with ``parts``, the vectors of these submodules alone. All are on the CPU: only for
            built-in methods they may stay on the GPU (see `Method.reduce`).
        """

    def statistics_fixed(self, phase: Phase) -> bool:
        """Return whether batch norm trains with the round's initial statistics (``--freeze-bn-after``).

        With ``--buffers local`` it is False in a client's first round, which has to measure statistics.
        """

    @property
    def personal(self) -> Message:
        """The client's own parts of the network (``--personal``), tensors by name, or an empty dict."""

    def frozen(self, message: Message) -> Any:
        """Return the network with the vectors of a message: frozen, in eval mode.

        The next call overwrites the network.

        With ``--personal`` the personal parts are the client's own.
        """

    def batch(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> Batch:
        """Return the client's own samples at ``indices`` (int64).

        Augmented if ``rng`` is given.
        """

    def fit(
        self,
        method: Objective,
        phase: Phase,
        module: nn.Module,
        *,
        message: Message | None = None,
        epochs: int | None = None,
        rows: np.ndarray | None = None,
        first: int | None = None,
    ) -> dict[str, float]:
        """Train any module in place with the loop of :meth:`train`: all its parameters that require gradients.

        The loop minimises ``method.loss(module, batch, received)`` with the run's optimiser settings, a fresh optimiser
        state and the random streams of ``phase``. It calls ``module.train()`` first: a module whose frozen parts must
        stay in eval mode overrides ``train``; batch norms whose parameters are frozen do. ``adjust_gradient`` sees the
        trained parameters as one vector.

        Args:
            module: the module, on ``device``.
            message: value of ``received.message``.
            epochs: passes over the client's data (default: the run's ``local_epochs``).
            rows: int64, the samples to train on; None for all.
            first: epochs of the run before this call, for ``--lr-steps`` (default: ``epochs`` in every earlier round).

        Returns:
            The means over all batches of ``loss`` and of the method's named scalars; they also go to the record.

        Raises:
            ValueError: no parameter of ``module`` requires a gradient.
            Diverged: a loss, gradient or parameter became NaN or infinite (the engine handles it: ``--on-nan``).
        """

    def fit_privately(
        self, method: Objective, phase: Phase, module: nn.Module, spending: DPSGD, *, rows: np.ndarray | None = None
    ) -> dict[str, float]:
        """Train a module like :meth:`fit`, with DP-SGD on the samples at ``rows``.

        Books the release in the client's privacy ledger.

        The clipping norm of ``spending`` replaces the run's ``clip_norm``.

        ``method.loss`` gets batches with ``per_sample`` set, and must be a mean over independent per-sample losses.

        Raises:
            UserError: the network has batch norm or other layers without per-sample gradients, or opacus is missing.
        """

    def load_pretrained(self, module: nn.Module) -> bool:
        """Load the client's pretrained weights (``--teachers``) into ``module``.

        Returns:
            False without ``--teachers``, else True.

        Raises:
            UserError: the weights are missing, damaged, not finite or of another architecture.
        """

    def in_order(
        self, size: int = 500, *, augment: bool = False, rng: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        """Yield all samples of the client in stored order, like :meth:`Samples.batches`."""

    @property
    def lr(self) -> float:
        """Learning rate of the epoch that :meth:`batches` is in or begins next."""

    @property
    def batch_size(self) -> int:
        """Samples of a full batch."""

    @property
    def epochs(self) -> int:
        """Local epochs of this exchange."""

    def batches(self, phase: Phase | None = None) -> Iterator[Batch]:
        """Yield the next epoch of the batches that :meth:`train` takes in an exchange, for your own loop.

        ``phase``: the exchange; None: this exchange.

        With ``--local-steps``, and if a slow client is cut short, no batch follows the last step. A user's own network
        gets inputs as a DataLoader gives them.
        """

    def model(self, message: Message) -> Any:
        """Return a copy of the network with the vectors of a message, in train mode.

        The network is the user's own module or a built-in one.
        """

    def upload(self, model: nn.Module) -> Message:
        """Return the vectors of a trained or replaced :meth:`model`, in the form of :meth:`train`.

        Raises:
            UserError: the module has other tensors than the run's network.
            Diverged: a value is NaN or infinite.
        """

    def validate(self, answer: Callable[[Tensor], Tensor]) -> float | None:
        """Return the accuracy of ``answer`` (images to logits [B, classes]) on the validation images.

        None if there are none.

        Use the accuracy for figures only: a client of a real federation has no such images.
        """

    def backgrounds(self) -> Backgrounds:
        """Return the client's own background bank, without the images that have no detected object."""


class Summing(Protocol):
    """Streaming weighted mean of vectors."""

    def add(self, vector: Tensor, weight: float) -> None:
        """Add a vector with its weight."""

    def mean(self) -> Tensor:
        """Return the weighted mean of the added vectors."""


class Server(Node, Protocol):
    """Interface of the server to its method.

    Attributes:
        trained_vectors: names of the flat vectors that `Client.train` returns: ``parameters``, and ``buffers`` and
            ``integers`` if the buffer policy lets them travel.
        state: kept from round to round, like a client's state.
        round_cache: kept between the exchanges of a round and dropped after the round.
        report: named figures in the records of this and later rounds (a later value replaces an earlier one) and, at
            the end, among the metrics of the summary.
        traffic: bytes of the communication rounds so far, ``{"up": ..., "down": ...}`` by name of the round, summed
            over clients and over rounds of that name.
        marks: names of the settings that the method has used.
        aggregator: rule that combines the clients' networks instead of their mean (``--aggregator``), or None.
        optimiser: step towards the clients' average (``--server-rule``), or None if the server takes the average.
    """

    federation: Federation
    traffic: Mapping[str, Mapping[str, int]]
    trained_vectors: tuple[str, ...]
    state: dict[str, Any]
    round_cache: dict[Any, Any]
    report: dict[str, float]
    marks: set[str]
    aggregator: Rule | None
    optimiser: ServerRule | None

    def build(self, *, model: str | None = None, width: int | None = None, classes: int | None = None) -> Any:
        """Return a freshly initialised network, identical to that of :meth:`Client.network` without ``stream``."""

    def initial(self) -> Message:
        """Return a freshly initialised network as flat vectors, drawn from the run's own stream."""

    def network(self, message: Message) -> nn.Module:
        """Return the network with these flat vectors, in eval mode.

        Later calls reuse the same module.
        """

    def accumulator(self, size: int) -> Summing:
        """Return a streaming weighted mean of vectors with ``size`` elements."""

    def log_image(self, name: str, value: Tensor | Callable[[], Tensor], axes: tuple[str, ...] = ("", "")) -> None:
        """Log images or a table as ``<name>.png``.

        The engine keeps them in a few rounds of the run only.

        Args:
            name: lower-case letters, digits and underscores; the same name in the same round replaces the earlier
                picture.
            value: images in [0, 1], fp ``[n, C, H, W]``, or a table, fp ``[rows, columns]``; or a function that returns
                either, called only in a round whose pictures are kept.
            axes: labels of a table's rows, columns and values, for example ``("client", "class", "weight")``; without a
                third one the values are labelled with the name.

        Another shape, a name that is no file name, and an error in the function are a warning: the picture is missing.
        """

    def refuse(self, client: ClientId, reason: str) -> None:
        """Refuse a client's upload for a reason that ``Method.expects`` cannot declare.

        The refusal ends the run; with ``--on-nan skip`` the client is left out of the rest of the round instead.

        Args:
            client: the uploading client.
            reason: beginning of a sentence that names the client, the upload and the fault.

        Raises:
            UserError: the run stops (``--on-nan stop``).
        """
