"""Figures of the final network alone: by class, areas under ROC curves, calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedkern.foreign_runs.recording import hash_labels
from fedkern.methods.roles import EvaluatedSet


@dataclass(frozen=True)
class FinalFigures:
    """Figures of the final network on the test sets and the validation set.

    Of clients' own networks, a figure is the mean and a matrix the sum.

    Attributes:
        metrics: figures by prefixed name, such as ``id_balanced_accuracy``.
        per_class: figures by test set, figure and class; None if undefined, as for a class without samples. Figures are
            ``recall`` and ``auroc``; ``dice`` of a segmentation; ``auroc`` and ``average_precision`` with several
            labels an image.
        confusion: counts int64 [C, C] by test set, true class and predicted class; none of the validation set.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    per_class: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    confusion: dict[str, Tensor] = field(default_factory=dict)


def final_figures(sets: Mapping[str, EvaluatedSet], classes: Sequence[str]) -> FinalFigures:
    """Return figures of the answers that the last evaluation kept.

    Sets of image-text pairs, and sets for which the method has no :func:`kept_answers`, have none.
    """
    result = FinalFigures()
    names = unique_names(classes)
    for prefix, data in sets.items():
        if not (outputs := [answer for _, answer in kept_answers(data, len(names))]):
            continue
        figures, name = data.task.final(data, outputs, names), set_name(prefix)
        result.metrics.update({prefix + figure: value for figure, value in figures.metrics.items()})
        result.per_class[name] = {figure: dict(values) for figure, values in figures.per_class.items()}
        if prefix != "validation_" and figures.confusion is not None:
            result.confusion[name] = figures.confusion
    return result


def kept_answers(data: EvaluatedSet, classes: int) -> list[tuple[int | None, Tensor]]:
    """Return what ``data`` kept if it has the shape that the task's final figures need, else nothing."""
    shape = data.task.kept_shape(data, classes)
    return data.kept if all(answer.shape == shape for _, answer in data.kept) else []


def hash_test_labels(sets: Mapping[str, EvaluatedSet]) -> dict[str, str]:
    """Return a hash of the labels in order by test set, to pair with recorded runs, none of pixels and texts."""
    judged = [(prefix, data) for prefix, data in sets.items() if prefix != "validation_" and data.kept]
    labelled = [(prefix, data) for prefix, data in judged if data.task.target in ("class", "labels")]
    return {set_name(prefix): hash_labels(data.labels.cpu()) for prefix, data in labelled}


def set_name(prefix: str) -> str:
    """Return a test set's name in files from its prefix: ``"id_"`` is ``"id"``, ``""`` is ``"test"``."""
    return prefix.removesuffix("_") or "test"


def unique_names(classes: Sequence[str]) -> list[str]:
    if len(set(classes)) == len(classes):
        return list(classes)
    return [f"{number} {name}" for number, name in enumerate(classes)]
