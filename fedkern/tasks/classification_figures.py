"""Figures of a classifier beyond its accuracy: by class, areas under ROC curves, calibration.

Definitions are scikit-learn's, whose import would take longer than the rest of a short run's start.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

BINS = 15
"""Bins of the expected calibration error, as in the paper that proposed the figure for networks."""


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return the counts int64 [C, C] by true class (row) and predicted class (column)."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


def recalls(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return the recall of every class, fp64 [C], NaN without samples."""
    right = torch.bincount(labels[labels == predicted], minlength=classes).double()
    return right / torch.bincount(labels, minlength=classes)  # 0 / 0 is NaN


def macro_f1(labels: Tensor, predicted: Tensor, classes: int) -> float:
    """Return the mean F1 of classes with samples."""
    right = torch.bincount(labels[labels == predicted], minlength=classes).double()
    true = torch.bincount(labels, minlength=classes)
    either = true + torch.bincount(predicted, minlength=classes)
    return float((2 * right / either)[true > 0].mean())


def areas(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the area under the ROC curve of every label, fp64 ``[L]``.

    NaN if all images have the label, or none, or if a score is NaN. Ties count one half. ``scores`` and ``labels`` are
    ``[n, L]``.
    """
    result = torch.full((scores.shape[1],), math.nan, dtype=torch.float64)
    for column in range(scores.shape[1]):
        has_label = labels[:, column].bool()
        positive, negative = int(has_label.sum()), int((~has_label).sum())
        if positive and negative and not bool(scores[:, column].isnan().any()):
            ranks = mean_ranks(scores[:, column])
            result[column] = (float(ranks[has_label].sum()) - positive * (positive + 1) / 2) / (positive * negative)
    return result


def roc_areas(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the area under the ROC curve of every class against all others, fp64 [C]."""
    return areas(scores, one_hot(labels, scores.shape[1]))


def macro_auc(scores: Tensor, labels: Tensor) -> float:
    """Return the mean of :func:`roc_areas`, NaN with fewer than two classes."""
    areas = [area for area in roc_areas(scores, labels).tolist() if not math.isnan(area)]
    return sum(areas) / len(areas) if areas else math.nan


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error, in [0, 1].

    Mean distance of confidence (the largest probability) and accuracy over ``bins`` of equal width, (0, 1/B] and so on,
    by their samples (Guo et al., ICML 2017, arXiv 1706.04599, equations 2 and 3). Not in scikit-learn.
    """
    confidence, predicted = probabilities.max(1)
    place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    distance = confidence - (predicted == labels).double()
    return float(torch.bincount(place, weights=distance, minlength=bins).abs().sum()) / len(labels)


def mean_ranks(values: Tensor) -> Tensor:
    """Return the ranks from 1, fp64 ``[n]``, where equal values share their mean rank."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    ranks: Tensor = ((2 * last - counts + 1).double() / 2)[group]
    return ranks
