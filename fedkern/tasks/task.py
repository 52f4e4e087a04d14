"""Base of the tasks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedkern import models
from fedkern.models.pretrained.vocabulary import Tokens
from fedkern.tasks.protocols import Description, JudgedSet, Label, Members, RunFacts, SampleSet, TaskBatch, Words

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
AHEAD = 16
"""Most batches that wait for a thread; more batches would only use memory."""


@dataclass(frozen=True)
class Figures:
    """Figures of the final network on one set, by name, and by name and class (None if undefined).

    ``confusion`` is int64 [C, C] by true and predicted class, or None.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    per_class: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    confusion: Tensor | None = None


@dataclass(frozen=True)
class Constant:
    """Figures of predicting one class everywhere on a test set.

    Attributes:
        figures: the best figure that a single class gives, by name.
        name: the class with the best accuracy or Dice; empty if several tie.
    """

    figures: Mapping[str, float]
    name: str


def better_values(metric: object) -> str | None:
    """Return ``"max"`` or ``"min"`` by a user-defined metric's ``higher_is_better``, or None."""
    return {True: "max", False: "min"}.get(getattr(metric, "higher_is_better", None))  # type: ignore[arg-type]


class Task:
    """Base of the tasks: a loss, figures, and the networks and labels that fit.

    Attributes:
        main: name of the main figure.
        better: ``"max"`` or ``"min"``: the better values of the main figure.
        noun: word for samples, in the plural.
        target: the label of a sample: ``"class"``, ``"labels"`` (0 or 1 for each), ``"pixels"`` or ``"text"``.
        partition: default partition; empty: the data's usual one.
        network: meaning of a network's output (``fedkern.models.ModelEntry.gives``).
        pictures: pictures of a finished run's answers, in `fedkern.report.figures.pictures`.
        offers: features that methods may ask for (``Method.requires``):

            - ``"loss"``: the loss of a batch, :meth:`loss`;
            - ``"criterion"``: a loss that is a mean over samples of a loss of the sample's output and target;
            - ``"classes"``: the outputs are logits of the target's classes, of a sample or a pixel;
            - ``"pixels"``: targets and outputs are of pixels;
            - ``"pairs"``: the targets are the samples' texts;
            - ``"images"``: the inputs are images;
            - ``"features"``: the outputs are linear in one feature vector of a sample.
        outside: most samples of a batch outside of training.
        concurrent: whether several batches of a set may be evaluated at once.
        takes_logits: whether the loss is a cross-entropy.
        plain_loss: whether the loss is the mean cross-entropy of the network's outputs, without weights or smoothing.
        sampled: name of the figure of :meth:`resample_figure`, if any.
        lacks: words for the lack of a set without the main figure, such as "no mask with an object".
    """

    name: ClassVar[str]
    main: ClassVar[str]
    better: ClassVar[Literal["max", "min"]] = "max"
    noun: ClassVar[str] = "images"
    target: ClassVar[str] = "class"
    partition: ClassVar[str] = ""
    network: ClassVar[str] = "classes"
    pictures: ClassVar[tuple[str, ...]] = ()
    offers: ClassVar[frozenset[str]] = frozenset({"loss"})
    outside: ClassVar[int] = 512
    concurrent: ClassVar[bool] = False
    takes_logits: bool = False
    plain_loss: bool = False
    sampled: ClassVar[str] = ""
    lacks: ClassVar[str] = ""

    def __reduce__(self) -> str | tuple[object, ...]:
        return self.name.upper()  # the object of the task's file

    # -- training --------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: TaskBatch) -> Tensor:
        """Return the loss of a batch (`fedkern.methods.protocol.Batch`), a scalar."""
        return self.criterion(model(batch.inputs), batch)

    def read_targets(self, targets: object) -> object:
        """Return a batch's targets in the form that the loss takes."""
        return targets

    def criterion(self, outputs: Tensor, batch: TaskBatch) -> Tensor:
        """Return the loss of a batch from the network's outputs, a scalar."""
        raise NotImplementedError

    def with_loss_copied(self) -> Task:
        """Return the task with a copy of the loss, for calls without side effects on the run."""
        return self

    def count_known(self, batch: TaskBatch) -> Tensor | int:
        """Count the known targets of a batch: samples or, for a segmentation, pixels."""
        return torch.ge(batch.targets, 0).sum()

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every sample with a known target, ``[n]``."""
        raise NotImplementedError

    # -- evaluation ------------------------------------------------------------------------------------------------

    def figures(self, model: nn.Module, data: JudgedSet) -> dict[str, float]:
        """Return the figures of a network in eval mode on a test set, the main figure first.

        ``data.record``, if present, receives the predicted classes in order, and ``data.keep``, if present and not
        None, the answers for :meth:`final`.
        """
        raise NotImplementedError

    @property
    def directions(self) -> dict[str, str | None]:
        """``"max"``, ``"min"`` or None for the main figure and user-defined metrics."""
        metrics = {name: better_values(metric) for name, metric in getattr(self, "metrics", {}).items()}
        return {**metrics, self.main: self.better}

    def score(self, figures: Mapping[str, float]) -> float:
        """Return the number to compare networks by, larger for a better one."""
        value = figures.get(self.main)
        return -figures["loss"] if value is None else value if self.better == "max" else -value

    def member_figures(self, model: Members, data: JudgedSet) -> dict[str, float]:
        """Return the members' mean figures, and their lowest and highest main figure."""
        rows = [self.figures_of_client(member, data, k) for k, member in enumerate(model.members)]
        shared = [name for name in rows[0] if all(name in row for row in rows)]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in shared}
        ends = [row[self.main] for row in rows if self.main in row]
        return {**means, **({f"lowest_{self.main}": min(ends), f"highest_{self.main}": max(ends)} if ends else {})}

    def figures_of_client(self, model: nn.Module, data: JudgedSet, client: int) -> dict[str, float]:
        return self.figures(model, data)

    def final(self, data: SampleSet, outputs: Sequence[Tensor], names: Sequence[str]) -> Figures:
        """Return figures from the last evaluation's answers, one entry for every network."""
        return Figures()

    def parts(self, output: Tensor, labels: Tensor, cases: Tensor | None) -> Tensor:
        """Return the samples' parts in the figure ``sampled``, fp64 ``[n, k]``, NaN if a sample has none.

        The figure is the mean over samples, then of the k means. ``output`` was kept by :meth:`figures`.
        """
        raise NotImplementedError

    def resample_figure(
        self, output: Tensor, labels: Tensor, cases: Tensor | None, rows: Rows, units: Rows, counts: Floats
    ) -> Floats:
        """Return the figure ``sampled`` of sets drawn from a set, fp64 ``[m]``, NaN if undefined.

        Args:
            output, labels, cases: see :meth:`parts`.
            rows, units: int64 ``[n]``, the samples to draw from, and the unit of each.
            counts: fp64 ``[m, units]``, how often a draw has each unit, with all of its samples.
        """
        parts = self.parts(output, labels, cases).numpy()[rows]
        sums, sizes = np.zeros((2, counts.shape[1], parts.shape[1]))
        np.add.at(sums, units, np.nan_to_num(parts))
        np.add.at(sizes, units, ~np.isnan(parts))
        with np.errstate(invalid="ignore"):  # einsum adds in one order, for any number of threads
            means = np.einsum("mg,gk->mk", counts, sums) / np.einsum("mg,gk->mk", counts, sizes)
        figures: Floats = torch.from_numpy(means).nanmean(1).numpy()
        return figures

    def kept_shape(self, data: SampleSet, classes: int) -> tuple[int, ...]:
        """Return the shape of the answers that :meth:`figures` keeps."""
        return len(data), classes

    def batch_size(self, size: int, positions: int) -> int:
        """Return the samples of an evaluation's batch, at most ``size``, by an image's pixels."""
        return size

    def comparable(self, sizes: Sequence[int]) -> tuple[str, ...]:
        """Return the figures, beside the loss, to compare clients with test sets of these sizes by."""
        return (self.main,)

    def has_main_figure(self, data: SampleSet) -> bool:
        """Return whether a set can have the main figure, whatever is predicted."""
        return True

    def constant(self, data: SampleSet, classes: Sequence[str]) -> Constant | None:
        """Return the figures of predicting one class everywhere, if there is a choice."""
        return None

    def chance(
        self, data: SampleSet | None, classes: int, *, counts: Rows | None = None, candidates: float = 0.0
    ) -> float | None:
        """Return the main figure that needs no learning, or None if unknown.

        ``data`` is None if the set must not be disclosed. Then ``counts`` are the samples of every class, and
        ``candidates`` the texts to choose from in retrieval.
        """
        return None

    def is_constant(self, data: JudgedSet) -> bool:
        """Return whether the kept answers are the same for all of several samples."""
        return False

    def unfit(self, split: SampleSet) -> str:
        """Return words for the lack of a set without any figures, such as "no pixel whose class is known"."""
        return ""

    def output_bytes(
        self, pair: tuple[object, object], play_last: Callable[[], tuple[object, object]], largest: int
    ) -> int:
        """Return the bytes of a sample's outputs and targets, or 0 if the loss never takes a whole set.

        ``pair`` has outputs and targets of a client's first samples, ``play_last()`` of the last ones; ``largest`` is
        the size of the largest set.
        """
        return 0

    def header(self, output_bytes: int, sizes: Mapping[str, int]) -> list[str]:
        """Return lines for the header of a run on how its figures are made.

        ``sizes`` are samples by test set, ``output_bytes`` a sample's (0: unknown).
        """
        return []

    # -- labels ----------------------------------------------------------------------------------------------------

    def convert_labels(self, labels: Tensor) -> Tensor:
        """Return whole-number labels in the task's dtype, or raise ValueError."""
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be whole numbers, but are {str(labels.dtype).removeprefix('torch.')}")
        return labels.to(torch.int64)

    def check_labels(self, labels: Tensor, samples: int, sides: Sequence[int]) -> None:
        """Raise ValueError if a split's labels have a wrong dtype, shape or value."""
        check_shape(labels, torch.int64, (samples,))
        if len(labels) and int(labels.min()) < 0:
            raise ValueError(
                f"labels: expected the class of every image, a number from 0, got {int(labels.min())}; leave out "
                "images without a class (-100 is for pixels)"
            )

    def check_range(self, labels: Tensor, classes: int, where: str) -> None:
        """Raise ValueError if labels are not among ``classes`` classes."""
        if labels.dtype != torch.int64:
            raise ValueError(f"labels of {labels.dtype} in {where}, expected int64")
        wrong = {int(end) for end in labels.aminmax()} - {*range(classes)} if labels.numel() else ()
        if wrong:
            raise ValueError(f"the label {max(wrong)} in {where}, where the classes are 0 to {classes - 1}")

    def check_classes(self, names: Sequence[str], ordered: bool) -> None:
        """Raise UserError if the task cannot have these classes, ``ordered`` if their order has a meaning."""

    def blank(self, samples: int, classes: int) -> Tensor:
        """Return placeholder labels."""
        return torch.zeros(samples, dtype=torch.int64)

    def counts(self, labels: np.ndarray, classes: int) -> npt.NDArray[np.int64]:
        """Return the samples of every class, int64 ``[classes]``."""
        return np.bincount(labels, minlength=classes)

    def classless(self, classes: int) -> str:
        """Return words for samples without a class to partition by, else ""."""
        return ""

    def shared_classes(self, labels: np.ndarray, classes: int) -> tuple[npt.NDArray[np.int64], int]:
        """Return the class ``[n]`` to partition by, and the number of classes."""
        return labels, classes

    def kinds(self, labels: np.ndarray, rare: bool) -> npt.NDArray[np.int64]:
        """Return the strata for held-out sampling, ``[n]``: equal numbers for interchangeable samples.

        ``rare``: sets of labels of a single sample are one stratum.
        """
        return labels

    def image_labels(self, labels: Tensor) -> Tensor:
        """Return every image's label, int64 ``[n]``, or labels, uint8 ``[n, L]``."""
        return labels.reshape(len(labels))

    def shown_classes(self, labels: Tensor) -> Tensor:
        """Return the numbers of the classes that occur, int64."""
        return (labels.flatten().clamp(min=-1) + 1).bincount()[1:].nonzero().flatten()

    def label_text(self, label: Label, classes: Sequence[str]) -> str:
        return classes[int(label)]

    def both_labels(self, labels: Sequence[Label], classes: Sequence[str]) -> str:
        return f"two labels, {' and '.join(self.label_text(label, classes) for label in labels)}"

    def map_labels(self, labels: Tensor, places: Sequence[int], classes: int) -> Tensor:
        """Return the labels with class k replaced by ``places[k]``."""
        return torch.tensor(places)[labels]

    def places(self, classes: Sequence[str], network_classes: Sequence[str]) -> Sequence[int] | None:
        """Return the positions of data's classes among the network's, or None if they do not fit."""
        places = [network_classes.index(name) for name in classes if name in network_classes]
        return places if len(places) == len(classes) and len({*network_classes}) == len(network_classes) else None

    # -- networks --------------------------------------------------------------------------------------------------

    def code(self) -> dict[str, object]:
        """Return a user-defined task's objects by name."""
        return {} if type(self).__module__.startswith("fedkern.") else {"task": self}

    def describe_network(self, context: RunFacts) -> Description:
        """Return the facts that :meth:`build` needs beside the network's name and sizes."""
        return {}

    def build(self, about: Description, seed: int) -> nn.Module:
        """Return a freshly initialised network.

        Args:
            about: ``model``, ``classes``, ``channels``, ``image_size`` (height, width), ``width``, and the entries of
                :meth:`describe_network`.
        """
        network: nn.Module = models.build(
            about["model"], classes=about["classes"], channels=about["channels"], image_size=min(about["image_size"]),
            seed=seed, width=about["width"], sides=about["image_size"],
        )  # fmt: skip
        return network

    def network_name(self, config: Any) -> str:
        return str(config.model)

    def vocabulary_messages(self, context: RunFacts) -> tuple[list[Words], Words] | None:
        """Return the clients' messages and the server's that make a shared vocabulary, or None."""
        return None

    def tokens(self, split: Any, tokenise: Callable[[], Callable[[Sequence[str]], Tokens]]) -> Tokens | None:
        """Return the tokens of a split's texts on the CPU, or None without texts."""
        return None

    def targets(self, labels: Tensor, tokens: Tokens | None, rows: Tensor) -> Tensor | Tokens:
        """Return the targets of a batch: its labels, or the ``tokens`` of ``rows`` on the labels' device."""
        return labels

    def output(self, classes: int, sides: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a network's output for one sample of height and width ``sides``."""
        return (classes,)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities of the classes, in the second axis."""
        return logits.softmax(1)

    def prediction_text(self, probabilities: Tensor, classes: Sequence[str]) -> str:
        """Return the predicted class of a sample, several labels joined by ``|``."""
        return classes[int(probabilities.argmax())]

    def answer_text(self, probabilities: Tensor, classes: Sequence[str]) -> str:
        """Return the answer to a sample in words."""
        return f"{self.prediction_text(probabilities, classes)}  {float(probabilities.max()):.3f}"


def check_shape(labels: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    expected, actual = (f"{kind} {[*axes]}"[6:] for kind, axes in ((dtype, shape), (labels.dtype, labels.shape)))
    if actual != expected:
        raise ValueError(f"labels: expected {expected}, got {actual}")


def iterate_outputs(model: nn.Module, data: JudgedSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a network's outputs for ``data.batches()`` with the targets, in order.

    With a pool of threads in ``data.pool`` several batches run at once, with the same outputs.
    """
    pool: ThreadPoolExecutor | None = getattr(data, "pool", None)
    if pool is None:
        for batch in data.batches():
            yield model(batch.inputs), batch.targets
        return
    forward = torch.no_grad()(model)
    ahead: deque[tuple[Future[Tensor], Tensor]] = deque()
    for batch in data.batches():
        # Copy this thread's context: the precision of networks is a context variable.
        ahead.append((pool.submit(copy_context().run, forward, batch.inputs), batch.targets))
        if len(ahead) > AHEAD:
            done, targets = ahead.popleft()
            yield done.result(), targets
    for done, targets in ahead:
        yield done.result(), targets


def mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def to_dict(values: Tensor, names: Sequence[str]) -> dict[str, float | None]:
    """Return the values by name, None for NaN."""
    return {name: None if math.isnan(value) else value for name, value in zip(names, values.tolist(), strict=True)}
