"""The base of the tasks: what the loss of a batch is, what an evaluation tells, and which networks and labels fit."""

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
    """Figures of the final network on one set, beside those of every round.

    Attributes:
        metrics: figures by name.
        per_class: figures by name and class; None where one is not defined, as for a class without samples.
        confusion: counts int64 [C, C] by true class and predicted class, or None.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    per_class: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    confusion: Tensor | None = None


@dataclass(frozen=True)
class Constant:
    """Figures of predicting one class everywhere on a test set.

    Attributes:
        figures: the best figure that a single class gives, by name.
        name: the class that gives the best accuracy or Dice; empty if several give the same.
    """

    figures: Mapping[str, float]
    name: str


def better_values(metric: object) -> str | None:
    """Return which values of a user's metric are the better ones, as its ``higher_is_better`` says, or None."""
    return {True: "max", False: "min"}.get(getattr(metric, "higher_is_better", None))  # type: ignore[arg-type]


class Task:
    """What a run's networks learn, and how they are judged.  Tasks are the objects of `fedkern.tasks`, one each.

    Attributes:
        name: the task's name in files and messages.
        main: name of the main figure.
        better: ``"max"`` or ``"min"``: which values of the main figure are the better ones.
        noun: what samples are called, in the plural.
        target: what the label of a sample is: ``"class"``, ``"labels"`` (0 or 1 for each), ``"pixels"`` or ``"text"``.
        partition: the partition of data that name none; empty where it is the data's usual one.
        network: what the output of a network is for (``fedkern.models.ModelEntry.gives``).
        pictures: names of the pictures of a finished run's answers, in `fedkern.report.figures.pictures`.
        offers: what methods may ask for (``Method.requires``):

            - ``"loss"``: the loss of a batch, :meth:`loss`;
            - ``"criterion"``: a loss that is a mean over samples of a loss of the sample's output and target;
            - ``"classes"``: the targets are classes, and the outputs are logits of the classes, of a sample or a pixel;
            - ``"pixels"``: targets and outputs are of pixels;
            - ``"pairs"``: the targets are the samples' texts;
            - ``"images"``: the inputs are images;
            - ``"features"``: the outputs are linear in one feature vector of a sample.
        outside: most samples of a batch outside of training.
        concurrent: whether several batches of a set may be evaluated at once.
        takes_logits: whether the loss is a cross-entropy, which takes a softmax of the outputs.
        sampled: name of the figure that :meth:`resampled` computes from what is kept; empty without one.
        lacks: what a set lacks that cannot have the main figure, such as "no mask with an object".
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
    sampled: ClassVar[str] = ""
    lacks: ClassVar[str] = ""

    def __reduce__(self) -> str | tuple[object, ...]:
        return self.name.upper()  # the object of the task's file

    # -- training --------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: TaskBatch) -> Tensor:
        """Return the loss of a batch (`fedkern.methods.protocol.Batch`), a scalar."""
        return self.criterion(model(batch.inputs), batch)

    def read_targets(self, targets: object) -> object:
        """Return the targets of a batch of items as the loss takes them."""
        return targets

    def criterion(self, outputs: Tensor, batch: TaskBatch) -> Tensor:
        """Return the loss of a batch by the network's outputs, a scalar."""
        raise NotImplementedError

    def with_loss_copied(self) -> Task:
        """Return the task with a copy of the loss, whose calls do not change the loss of the run."""
        return self

    def known(self, batch: TaskBatch) -> Tensor | int:
        """Return how many targets of a batch are known: samples or, of a segmentation, pixels."""
        return (batch.targets >= 0).sum()

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every sample with a known target, ``[n]``.

        The others are left out.
        """
        raise NotImplementedError

    # -- evaluation ------------------------------------------------------------------------------------------------

    def figures(self, model: nn.Module, data: JudgedSet) -> dict[str, float]:
        """Figures of a network in eval mode on a test set, the main figure first.

        Args:
            data: ``data.batches()`` yields batches in order.  ``data.record(predictions)``, where it exists, receives
                the predicted classes in order, and ``data.keep(answers)``, where it exists and is not None, what
                :meth:`final` needs.

        Raises:
            ValueError: no sample has a known target.
        """
        raise NotImplementedError

    @property
    def directions(self) -> dict[str, str | None]:
        """Return which values are the better ones, by figure: of the main figure, and of metrics that a user adds."""
        metrics = {name: better_values(metric) for name, metric in getattr(self, "metrics", {}).items()}
        return {**metrics, self.main: self.better}

    def score(self, figures: Mapping[str, float]) -> float:
        """Return what networks are compared by, larger for a better one: the main figure, or else the loss."""
        value = figures.get(self.main)
        return -figures["loss"] if value is None else value if self.better == "max" else -value

    def member_figures(self, model: Members, data: JudgedSet) -> dict[str, float]:
        """Means of the figures of ``model.members``, and the lowest and highest value of their main figure."""
        rows = [self.figures_of_client(member, data, k) for k, member in enumerate(model.members)]
        shared = [name for name in rows[0] if all(name in row for row in rows)]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in shared}
        ends = [row[self.main] for row in rows if self.main in row]
        return {**means, **({f"lowest_{self.main}": min(ends), f"highest_{self.main}": max(ends)} if ends else {})}

    def figures_of_client(self, model: nn.Module, data: JudgedSet, client: int) -> dict[str, float]:
        """Return :meth:`figures` of a client's own network."""
        return self.figures(model, data)

    def final(self, data: SampleSet, outputs: Sequence[Tensor], names: Sequence[str]) -> Figures:
        """Figures of the run's end from what the last evaluation kept, one entry for every network."""
        return Figures()

    def parts(self, output: Tensor, labels: Tensor, cases: Tensor | None) -> Tensor:
        """Return the samples' parts in the figure ``sampled``, fp64 ``[n, k]``, NaN where a sample has none.

        The figure is their mean over samples, and of the k means.

        Args:
            output: what :meth:`figures` keeps of a network.
            labels, cases: those of the set, on the CPU.
        """
        raise NotImplementedError

    def resampled(
        self, output: Tensor, labels: Tensor, cases: Tensor | None, rows: Rows, units: Rows, counts: Floats
    ) -> Floats:
        """Return the figure ``sampled`` of sets that are drawn from a set, fp64 ``[m]``, NaN where it is not defined.

        Args:
            output, labels, cases: see :meth:`parts`.
            rows, units: int64 ``[n]``, the samples to draw from, and the unit of each, counted from 0.
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
        """Shape of what :meth:`figures` keeps of a network."""
        return len(data), classes

    def batch_size(self, size: int, positions: int) -> int:
        """Return the samples of an evaluation's batch, of at most ``size``, by the number of an image's pixels."""
        return size

    def comparable(self, sizes: Sequence[int]) -> tuple[str, ...]:
        """Names of the figures beside the loss by which clients with test sets of these sizes are compared."""
        return (self.main,)

    def defined(self, data: SampleSet) -> bool:
        """Whether a set can have the main figure, whatever is predicted; else it ``lacks`` something."""
        return True

    def constant(self, data: SampleSet, classes: Sequence[str]) -> Constant | None:
        """Return what predicting one class everywhere gives on a set.

        None where there is nothing to compare.
        """
        return None

    def chance(
        self, data: SampleSet | None, classes: int, *, counts: Rows | None = None, candidates: float = 0.0
    ) -> float | None:
        """Return the main figure that needs no learning, or None where it is not known.

        Args:
            data: the set, or None where it must not be told.
            counts: samples of every class, where the set itself is not there.
            candidates: texts to choose from in retrieval; 0: not known.
        """
        return None

    def unvaried(self, data: JudgedSet) -> bool:
        """Return whether the answers that an evaluation kept are the same for all of several samples."""
        return False

    def unfit(self, split: SampleSet) -> str:
        """Return what a set lacks so that it has no figures at all, such as "no pixel whose class is known"."""
        return ""

    def output_bytes(
        self, pair: tuple[object, object], play_last: Callable[[], tuple[object, object]], largest: int
    ) -> int:
        """Return the bytes of a sample's outputs and targets, or 0 where no loss takes those of a set at once.

        Args:
            pair: outputs and targets of a client's first samples.
            play_last: returns those of its last samples.
            largest: samples of the largest set that is evaluated.
        """
        return 0

    def header(self, output_bytes: int, sizes: Mapping[str, int]) -> list[str]:
        """Return lines for the header of a run on how its figures are made.

        Args:
            output_bytes: bytes of a sample's outputs and targets; 0: nobody knows.
            sizes: samples by test set.
        """
        return []

    # -- labels ----------------------------------------------------------------------------------------------------

    def checked(self, labels: Tensor) -> Tensor:
        """Labels of any whole numbers in the dtype that the task has.

        Raises:
            ValueError: values that are no labels of the task.
        """
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be whole numbers, but are {str(labels.dtype).removeprefix('torch.')}")
        return labels.to(torch.int64)

    def check_labels(self, labels: Tensor, samples: int, sides: Sequence[int]) -> None:
        """Raise ValueError where a split's labels have a dtype, shape or values that no label of the task has."""
        check_shape(labels, torch.int64, (samples,))
        if len(labels) and int(labels.min()) < 0:
            raise ValueError(
                f"labels: expected the class of every image, a number from 0, got {int(labels.min())}; leave out "
                "images without a class (-100 is for pixels)"
            )

    def check_range(self, labels: Tensor, classes: int, where: str) -> None:
        """Raise ValueError where labels are none of this many classes.

        ``where`` they are, in words.
        """
        if labels.dtype != torch.int64:
            raise ValueError(f"labels of {labels.dtype} in {where}, expected int64")
        wrong = {int(end) for end in labels.aminmax()} - {*range(classes)} if labels.numel() else ()
        if wrong:
            raise ValueError(f"the label {max(wrong)} in {where}, where the classes are 0 to {classes - 1}")

    def check_classes(self, names: Sequence[str], ordered: bool) -> None:
        """Raise UserError where the classes are none for the task.

        ``ordered``: whether their order has a meaning.
        """

    def blank(self, samples: int, classes: int) -> Tensor:
        """Labels of samples of which only the number is known."""
        return torch.zeros(samples, dtype=torch.int64)

    def counts(self, labels: np.ndarray, classes: int) -> npt.NDArray[np.int64]:
        """Return the samples of every class, int64 ``[classes]``."""
        return np.bincount(labels, minlength=classes)

    def classless(self, classes: int) -> str:
        """Return what samples have in the place of a class by which they could be shared out.

        Empty where they have one.
        """
        return ""

    def shared_classes(self, labels: np.ndarray, classes: int) -> tuple[npt.NDArray[np.int64], int]:
        """Return the class by which partitions share samples out, ``[n]``, and the number of classes."""
        return labels, classes

    def kinds(self, labels: np.ndarray, rare: bool) -> npt.NDArray[np.int64]:
        """Equal numbers for samples that stand for each other in a held-out set, ``[n]``.

        ``rare``: sets of labels that a single sample has are of one kind.
        """
        return labels

    def image_labels(self, labels: Tensor) -> Tensor:
        """Return the label of every image, int64 ``[n]``.

        Of several labels all, uint8 ``[n, L]``.
        """
        return labels.reshape(len(labels))

    def shown_classes(self, labels: Tensor) -> Tensor:
        """Numbers of the classes that the labels show, int64."""
        return (labels.flatten().clamp(min=-1) + 1).bincount()[1:].nonzero().flatten()

    def label_text(self, label: Label, classes: Sequence[str]) -> str:
        """Return an image's label in words."""
        return classes[int(label)]

    def both_labels(self, labels: Sequence[Label], classes: Sequence[str]) -> str:
        """Return words for two different labels of one image."""
        return f"two labels, {' and '.join(self.label_text(label, classes) for label in labels)}"

    def relabelled(self, labels: Tensor, places: Sequence[int], classes: int) -> Tensor:
        """Return the labels where the class at position k is the class number ``places[k]`` of ``classes``."""
        return torch.tensor(places)[labels]

    def places(self, classes: Sequence[str], network_classes: Sequence[str]) -> Sequence[int] | None:
        """Positions of data's classes among those that a network knows.

        None where the data do not fit the network.
        """
        places = [network_classes.index(name) for name in classes if name in network_classes]
        return places if len(places) == len(classes) and len({*network_classes}) == len(network_classes) else None

    # -- networks --------------------------------------------------------------------------------------------------

    def code(self) -> dict[str, object]:
        """Return the objects that a user gave for the task, by name.

        None for a task of fedkern.
        """
        return {} if type(self).__module__.startswith("fedkern.") else {"task": self}

    def described(self, context: RunFacts) -> Description:
        """Return what :meth:`build` needs beside the network's name and sizes: entries of model.safetensors."""
        return {}

    def build(self, about: Description, seed: int) -> nn.Module:
        """Return a freshly initialised network.

        Args:
            about: ``model``, ``classes``, ``channels``, ``image_size`` (height, width), ``width``, and the entries of
                :meth:`described`.
        """
        return models.build(
            about["model"], classes=about["classes"], channels=about["channels"], image_size=min(about["image_size"]),
            seed=seed, width=about["width"], sides=about["image_size"],
        )  # fmt: skip

    def network_name(self, config: Any) -> str:
        """Name of the network that a run trains."""
        return str(config.model)

    def vocabulary_messages(self, context: RunFacts) -> tuple[list[Words], Words] | None:
        """Every client's message and the server's that make a vocabulary which all share.

        None without one.
        """
        return None

    def tokens(self, split: Any, tokenise: Callable[[], Callable[[Sequence[str]], Tokens]]) -> Tokens | None:
        """Return the tokens of a split's texts on the CPU, by the tokeniser that ``tokenise()`` gives.

        None without texts.
        """
        return None

    def targets(self, labels: Tensor, tokens: Tokens | None, rows: Tensor) -> Tensor | Tokens:
        """Targets of a batch: its labels, or those of the ``tokens`` that belong to the ``rows``, on labels' device."""
        return labels

    def output(self, classes: int, sides: Sequence[int]) -> tuple[int, ...]:
        """Shape of a network's output for one sample.

        ``sides`` are an image's height and width.
        """
        return (classes,)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes, in the second axis."""
        return logits.softmax(1)

    def predicted(self, probabilities: Tensor, classes: Sequence[str]) -> str:
        """Return the predicted class of a sample.

        Several labels joined by ``|``.
        """
        return classes[int(probabilities.argmax())]

    def said(self, probabilities: Tensor, classes: Sequence[str]) -> str:
        """Return the answer to a sample in words, from the classes' probabilities."""
        return f"{self.predicted(probabilities, classes)}  {float(probabilities.max()):.3f}"


def check_shape(labels: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raise ValueError where a split's labels have another dtype or shape."""
    expected, actual = (f"{kind} {[*axes]}"[6:] for kind, axes in ((dtype, shape), (labels.dtype, labels.shape)))
    if actual != expected:
        raise ValueError(f"labels: expected {expected}, got {actual}")


def answers(model: nn.Module, data: JudgedSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a network's outputs for ``data.batches()`` with the targets, in order.

    If ``data.pool`` is a pool of threads, several batches run at once; the outputs are the same as with one thread.
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
    """Mean of tensors of one shape."""
    return torch.stack(list(values)).mean(0)


def to_dict(values: Tensor, names: Sequence[str]) -> dict[str, float | None]:
    """Values by name, None for NaN."""
    pairs = zip(names, values.tolist(), strict=True)
    return {name: None if math.isnan(value) else value for name, value in pairs}
