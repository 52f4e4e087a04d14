"""Figures of a network that gives every image several labels or none.

AUROC and average precision are defined as in scikit-learn, and the tests compare both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedkern.tasks.classification_figures import areas

MAIN = "macro_auroc"
"""Main figure: mean of the labels' areas under the ROC curve."""


def label_figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Figures over all labels; one that is not defined for any label is left out.  All are NaN where a logit is.

    Args:
        logits: ``[n, L]``; a label is predicted where its logit is above 0, a probability above one half.
        labels: 0 and 1, ``[n, L]``.

    Returns:
        - ``macro_auroc``: mean of :func:`areas` over the labels that have one;
        - ``mean_average_precision``: mean of :func:`average_precisions` over the labels that occur;
        - ``macro_f1``: mean F1 of the labels that occur;
        - ``exact_match``: share of the images all of whose labels are right (subset accuracy).
    """
    predicted, true = logits > 0, labels.bool()
    f1 = 2 * (predicted & true).sum(0).double() / (predicted.sum(0) + true.sum(0))
    found = {
        MAIN: float(areas(logits, labels).nanmean()),
        "mean_average_precision": float(average_precisions(logits, labels).nanmean()),
        "macro_f1": float(f1[true.any(0)].mean()),  # NaN without a label that occurs
        "exact_match": float((predicted == true).all(1).double().mean()),
    }
    if bool(logits.isnan().any()):  # no label is predicted then, which would be right for many images
        return dict.fromkeys(found, math.nan)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def average_precisions(scores: Tensor, labels: Tensor) -> Tensor:
    """The average precision of every label, fp64 ``[L]``; NaN where no image has the label.

    It is the sum over thresholds of precision times the gain in recall; images with equal scores share a threshold.

    Args:
        scores: ``[n, L]``, larger where a label is more likely.  A label with a NaN has no average precision.
        labels: 0 and 1, ``[n, L]``.
    """
    found = torch.full((scores.shape[1],), math.nan, dtype=torch.float64)
    for column in range(scores.shape[1]):
        own = labels[:, column].double()
        if not bool(own.any()) or bool(scores[:, column].isnan().any()):
            continue
        values, place = torch.unique(scores[:, column], return_inverse=True)
        hits = torch.bincount(place, weights=own, minlength=len(values)).flip(0)  # from the highest score down
        images = torch.bincount(place, minlength=len(values)).flip(0)
        found[column] = float((hits * hits.cumsum(0) / images.cumsum(0)).sum() / own.sum())
    return found


def unvaried(logits: Tensor) -> bool:
    """Whether every label is predicted for all images alike."""
    predicted = logits > 0
    return bool((predicted == predicted[:1]).all())
