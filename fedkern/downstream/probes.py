"""Linear classifiers on frozen features, and their figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern.streams import stream
from fedkern.tasks.classification_figures import macro_auc

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Penalties for the validation set to choose from. Few-shot probes have no validation set and take `FEW_SHOT`."""
FEW_SHOT = 1e-2


class LinearProbe:
    """Multinomial logistic regression on standardised features, fitted to the optimum by L-BFGS in float64.

    Minimises the mean cross-entropy plus ``penalty / 2`` times the squared norm of the weights (not of the bias).

    Args:
        features: ``[n, d]``.
        labels: int64 ``[n]`` in ``[0, classes)``. A class without samples gets a weight like any other.
        penalty: above 0.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, penalty: float) -> None:
        x = features.double()
        self._mean = x.mean(0)
        deviation = x.std(0, correction=0)
        self._scale = torch.where(deviation > 1e-12, deviation, 1.0)
        x = (x - self._mean) / self._scale
        weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, device=x.device, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, device=x.device, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [weight, bias], max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-11, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = F.cross_entropy(x @ weight + bias, labels) + 0.5 * penalty * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimiser.step(closure)
        self.weight, self.bias = weight.detach(), bias.detach()

    def logits(self, features: Tensor) -> Tensor:
        """Return fp64 ``[n, C]`` for features ``[n, d]``."""
        return ((features.double() - self._mean) / self._scale) @ self.weight + self.bias


def few_shot_rows(labels: Tensor, shots: int, seed: int, draw: int) -> Tensor:
    """Return ``shots`` random rows of every class (all rows of a smaller class), sorted, int64."""
    rng = stream(seed, f"few-shot/{shots}", round=draw)
    values = labels.cpu().numpy()
    rows = [rng.permutation(np.flatnonzero(values == label))[:shots] for label in np.unique(values)]
    return torch.from_numpy(np.sort(np.concatenate(rows)))


def figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return ``accuracy`` and, unless all labels are equal, ``auc`` of logits ``[n, C]``."""
    result = {"accuracy": float((logits.argmax(1) == labels).double().mean())}
    area = macro_auc(F.softmax(logits.double(), 1), labels)
    return result if math.isnan(area) else {**result, "auc": area}


def average_figures(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in shared}
