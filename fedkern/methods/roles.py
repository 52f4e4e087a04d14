"""The two sides a method runs on, as it sees them: the client, the server, and what training asks of the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.methods.protocol import (
    Backgrounds,
    Batch,
    ClientId,
    Federation,
    Message,
    Received,
    Samples,
    Step,
)
from fedkern.methods.terms import Terms
from fedkern.privacy import DPSGD, Unit


class Objective:
    """What the engine's training loop asks of whoever trains: a loss, its draws, and a say in the gradient."""

    def loss(self, model: Any, batch: Batch, received: Received) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The local objective of one batch, a scalar; optionally with named scalars whose mean is recorded."""
        raise NotImplementedError

    def draw(self, client: Client, batch: Batch, rng: np.random.Generator) -> dict[str, Any]:
        """Random draws that belong to a batch; what it returns becomes ``batch.drawn``."""
        return {}

    def terms(self, received: Received) -> Terms | None:
        """What is added to the gradient of every step of the exchange; asked for before its first step."""
        return None

    def adjust_gradient(self, parameters: Tensor, gradients: Tensor, received: Received) -> None:
        """Changes ``gradients`` [P] in place, after the backward pass and before the optimiser.

        For what :meth:`terms` cannot say: those are added here, unless this is overridden.
        """
        terms = self.terms(received)
        if terms is not None:
            terms.add_to(gradients, parameters)


class Node(Protocol):
    """What a client and the server have in common: where they are, and what the run is about.

    Attributes:
        device: where networks live and batches arrive.
        task: ``"classification"``, ``"segmentation"`` or ``"retrieval"`` (image-text pairs).
        classes: the class names, in label order.
        image_shape: channels, height and width of what a network sees.
        mean, std: per channel, of images in [0, 1]; a normalised image is ``(image - mean) / std``.
        public: labelled images that everybody may see and no client holds (``--public-samples``), or None.
    """

    device: torch.device
    task: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def public(self) -> Samples | None: ...

    def rng(self, purpose: str, step: Step) -> np.random.Generator:
        """The client's (the server's) own stream for a purpose and round."""
        ...

    def warn(self, name: str, text: str) -> None:
        """Adds a named diagnostic to the run's summary."""
        ...

    def notice(self, text: str) -> None:
        """Tells whoever watches the run, at once, how far something long has come; kept nowhere."""
        ...


class Client(Node, Protocol):
    """A client as its method sees it.

    Attributes:
        samples: training samples, n.
        declared: the same as everybody may know it (``Federation.samples``): weights and schedules follow from it.
        labels: int64 [n], or [n, H, W] for segmentation, on the CPU.
        state: outlives the round; tensors, numbers, strings and dicts of such, read back on the CPU.  A private method
            keeps the ``state`` of the client's :class:`fedkern.privacy.Accountant` under ``fedkern.privacy.LEDGER``.
        round_cache: lives between the exchanges of a round and may vanish.
        report: named figures of the client in the round's record.
    """

    id: ClientId
    samples: int
    declared: int
    labels: Tensor
    state: dict[str, Any]
    round_cache: dict[str, Any]
    report: dict[str, float]

    @property
    def groups(self) -> np.ndarray | None:
        """int64 [n], counted from 0, the patient, case or image of every sample, where some have several; else None.

        What a client holds out for itself has all samples of one, or none.
        """
        ...

    @property
    def patients(self) -> np.ndarray | None:
        """int64 [n], counted from 0, the patient of every sample, where patients are the unit of privacy; else None."""
        ...

    @property
    def unit(self) -> Unit:
        """The unit of privacy."""
        ...

    @property
    def objects_known(self) -> bool:
        """Whether anything is known about what is object and what is background in the client's images."""
        ...

    def network(
        self,
        *,
        model: str | None = None,
        width: int | None = None,
        classes: int | None = None,
        stream: str | None = None,
    ) -> Any:
        """A freshly initialised network of its own, in train mode, channels-last, on ``device``.

        It comes from the run's own stream, so it is the same at every client and at every call; with ``stream`` from
        the client's own one of that name, so it is the same at every call of this client alone.

        Args:
            model: another architecture than the run's, by name.
            width: channels of the first stage; the run's, or another architecture's own.
            classes: number of outputs.
            stream: what the initial weights are drawn for, where they shall be the client's own.

        Raises:
            UserError: there is no such network.
        """
        ...

    def train(
        self,
        method: Objective,
        step: Step,
        message: Message,
        *,
        parts: Sequence[str] | None = None,
        steps: int | None = None,
        rows: np.ndarray | None = None,
        anchor: Message | None = None,
    ) -> Message:
        """The engine's training loop: local epochs on ``method.loss`` from the received parameters.

        Args:
            parts: names of the network's submodules to train, neighbours in its vectors; the others stay as they are,
                in eval mode, and ``method.loss`` keeps gradients from them.
            steps: optimiser steps instead of the run's local budget.
            rows: int64, the samples to train on; None for all.
            anchor: the vectors of ``received.model``, where it is not the network that training starts from.

        Returns ``{"parameters": fp32 [P], ...}`` with ``"buffers"`` fp32 [Q] and ``"integers"`` int64 [R] where the
        buffer policy lets them travel; of the ``parts`` alone where they are named.
        """
        ...

    def statistics_fixed(self, step: Step) -> bool:
        """Whether batch norm trains with the received statistics in this round (``--fix-statistics``)."""
        ...

    def frozen(self, message: Message) -> Any:
        """The network with the vectors of a message: frozen, in eval mode; overwritten by the next one received."""
        ...

    def batch(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> Batch:
        """The client's own samples at ``indices`` (int64); augmented when ``rng`` is given."""
        ...

    def fit(
        self,
        method: Objective,
        step: Step,
        module: nn.Module,
        *,
        message: Message | None = None,
        epochs: int | None = None,
        rows: np.ndarray | None = None,
        lr_end: float | None = None,
        after_epoch: Callable[[int], None] | None = None,
        first: int | None = None,
    ) -> dict[str, float]:
        """The same loop on any module, in place: SGD on those of its parameters that require gradients.

        ``method.loss(module, batch, received)`` is what it minimises, with the run's optimiser settings, a fresh
        momentum and the streams of ``step``.  ``module.train()`` is called first: a module whose frozen parts must stay
        in eval mode overrides ``train``.  ``adjust_gradient`` sees the trained parameters as one vector.

        Args:
            module: on ``device``.
            message: what ``received.message`` is.
            epochs: passes over the client's data (default: the run's ``local_epochs``).
            rows: int64, the samples to train on; None for all.
            lr_end: learning rate that the last epoch comes down to along half a cosine; None: none.
            after_epoch: called with the number of every epoch done, from 0; it may leave the module in eval mode.
            first: epochs of the run before these, for ``--lr-steps`` (default: ``epochs`` in every round before).

        Returns:
            The means over all batches of ``loss`` and of whatever the method observed; they also go to the record.

        Raises:
            ValueError: no parameter of ``module`` requires a gradient.
            Diverged: a loss, gradient or parameter became NaN or infinite (the engine handles it: ``--on-nan``).
        """
        ...

    def fit_privately(
        self,
        method: Objective,
        step: Step,
        module: nn.Module,
        spending: DPSGD,
        *,
        rows: np.ndarray | None = None,
        epochs: int | None = None,
    ) -> dict[str, float]:
        """As :meth:`fit`, by DP-SGD, on the samples at ``rows``; books the release in the client's ledger.

        ``method.loss`` gets batches that are ``apart``, and must be a mean over samples of each one's own loss.

        Raises:
            UserError: the network has batch norm or other layers without per-sample gradients, or opacus is missing.
        """
        ...

    def load_pretrained(self, module: nn.Module) -> bool:
        """Loads the weights that this client brings (``--teachers``) into ``module``; False where it brings none.

        Raises:
            UserError: they are missing, damaged, not finite or of another architecture.
        """
        ...

    def batches(
        self, size: int = 500, *, augment: bool = False, rng: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        """The client's own samples, as :meth:`Samples.batches` gives them."""
        ...

    def validate(self, answer: Callable[[Tensor], Tensor]) -> float | None:
        """The share of the validation images that ``answer`` (images to logits [B, classes]) is right about.

        For figures alone: a client of a real federation has no such images.  None where the data have none.
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


class Server(Node, Protocol):
    """The server as its method sees it.

    Attributes:
        trained_vectors: which of a network's vectors `Client.train` returns: ``parameters``, and ``buffers`` and
            ``integers`` where the buffer policy lets them travel.
        state: outlives the round, as a client's does.
        round_cache: lives between the exchanges of a round and may vanish.
        report: named figures; they stand in the records of this and later rounds (a later value replaces an earlier
            one) and, at the end, among the metrics of the summary.
    """

    federation: Federation
    trained_vectors: tuple[str, ...]
    state: dict[str, Any]
    round_cache: dict[Any, Any]
    report: dict[str, float]

    def build(self, *, model: str | None = None, width: int | None = None, classes: int | None = None) -> Any:
        """A freshly initialised network, exactly the one of :meth:`Client.network`."""
        ...

    def initial(self) -> Message:
        """A freshly initialised network as flat vectors, from the run's own stream."""
        ...

    def network(self, message: Message) -> nn.Module:
        """The network with these flat vectors, in eval mode; reused by later calls."""
        ...

    def accumulator(self, size: int) -> Any:
        """A streaming weighted mean over vectors of ``size`` elements."""
        ...

    def log_image(self, name: str, value: Tensor | Callable[[], Tensor], axes: tuple[str, str] = ("", "")) -> None:
        """Offers something to look at; of a few rounds of the run it is kept and becomes ``<name>.png``.

        Args:
            name: lower-case letters, digits and underscores; shown again in the same round it replaces the earlier one.
            value: images in [0, 1], fp ``[n, C, H, W]``, or a table, fp ``[rows, columns]``; or what makes them, called
                only in a round that is kept.
            axes: what the rows and the columns of a table are, for example ``("client", "class")``.

        Raises:
            ValueError: another shape, or a name that does not make a file's.
        """
        ...

    def refuse(self, client: ClientId, reason: str) -> None:
        """Says that a client's upload cannot be used for a reason that ``Method.expects`` cannot state.

        It ends the run, or with ``--on-nan skip`` the client is left out of the rest of the round.

        Args:
            client: whose upload.
            reason: the beginning of a sentence that names client, upload and fault.

        Raises:
            UserError: the run is not to go on without it.
        """
        ...
