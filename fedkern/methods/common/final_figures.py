"""Figures of the final network beyond those of every round: by class, areas under ROC curves, calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedkern.methods.common import classification_figures as of_classes
from fedkern.methods.common import multilabel_figures as of_labels

MATRIX = 1000
"""Most classes of a confusion matrix that is kept: a larger one cannot be drawn."""


@dataclass(frozen=True)
class FinalFigures:
    """Figures of the final network on the test sets and the validation set.

    Where clients have networks of their own, a figure is the mean of the networks', a matrix the sum.

    Attributes:
        metrics: figures by prefixed name, such as ``id_balanced_accuracy``.
        per_class: test set, then figure, then class; None where the figure is not defined, as for a class without
            samples.  Figures are ``recall`` and ``auroc``; ``dice`` of a segmentation; ``auroc`` and
            ``average_precision`` where an image may have several labels.
        confusion: counts int64 [C, C] by test set, true class and predicted class; none of the validation set.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    per_class: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    confusion: dict[str, Tensor] = field(default_factory=dict)


def final_figures(sets: Mapping[str, Any], classes: Sequence[str]) -> FinalFigures:
    """The figures that follow from what the last evaluation kept (``TestSet.kept``); no network is asked again.

    A set has none of them if it is of image-text pairs, or if the method's own ``evaluate`` kept no :func:`answers`.
    """
    found = FinalFigures()
    names = unique_names(classes)
    for prefix, data in sets.items():
        kept = [answer for _, answer in answers(data, len(names))]
        if not kept:
            continue
        name = set_name(prefix)
        if data.task == "segmentation":
            found.per_class[name] = {"dice": _named(_mean(kept), names)}
            continue
        labels = data.labels.cpu()
        if data.task == "multilabel":
            found.per_class[name] = {
                "auroc": _named(_mean([of_classes.areas(logits, labels) for logits in kept]), names),
                "average_precision": _named(
                    _mean([of_labels.average_precisions(logits, labels) for logits in kept]), names
                ),
            }
            continue
        each = [_classified(logits, labels) for logits in kept]
        for figure in each[0][0]:
            if all(figure in one for one, _ in each):
                found.metrics[prefix + figure] = sum(one[figure] for one, _ in each) / len(each)
        tables = [table for _, table in each]
        found.per_class[name] = {
            figure: _named(_mean([table[figure] for table in tables]), names)
            for figure in tables[0]
            if all(figure in table for table in tables)
        }
        if prefix != "validation_" and len(names) <= MATRIX:
            matrices = [of_classes.confusion(labels, logits.double().argmax(1), len(names)) for logits in kept]
            found.confusion[name] = torch.stack(matrices).sum(0)
    return found


def answers(data: Any, classes: int) -> list[tuple[int | None, Tensor]]:
    """What ``data`` kept, if that is a logit for every sample and class (segmentation: a Dice for every class)."""
    shape = (classes,) if data.task == "segmentation" else (len(data), classes)
    return data.kept if all(answer.shape == shape for _, answer in data.kept) else []


def _classified(logits: Tensor, labels: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
    """One network's figures from its logits [n, C], and those of every class, fp64 [C]."""
    logits = logits.double()
    classes = logits.shape[1]
    predicted = logits.argmax(1)
    recalls = of_classes.recalls(labels, predicted, classes)
    figures = {
        "balanced_accuracy": float(recalls.nanmean()),
        "macro_f1": of_classes.macro_f1(labels, predicted, classes),
    }
    table = {"recall": recalls}
    probabilities = logits.softmax(1)
    if bool(probabilities.isfinite().all()):  # a logit may overflow, though every parameter is finite
        areas = of_classes.roc_areas(probabilities, labels)
        if not math.isnan(area := float(areas.nanmean())):
            figures["auroc"], table["auroc"] = area, areas
        figures["ece"] = of_classes.calibration_error(probabilities, labels)
    return figures, table


def set_name(prefix: str) -> str:
    """Name of a test set in files, from the prefix of its figures: ``"id_"`` is ``"id"``, and ``""`` is ``"test"``."""
    return prefix.removesuffix("_") or "test"


def unique_names(classes: Sequence[str]) -> list[str]:
    """Names of the classes; each begins with its number where two classes have the same name."""
    if len(set(classes)) == len(classes):
        return list(classes)
    return [f"{number} {name}" for number, name in enumerate(classes)]


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _named(values: Tensor, names: Sequence[str]) -> dict[str, float | None]:
    pairs = zip(names, values.tolist(), strict=True)
    return {name: None if math.isnan(value) else value for name, value in pairs}
