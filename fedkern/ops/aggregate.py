"""aggregate: weighted averages of flat model buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_mean_reference(vectors: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float]) -> Tensor:
    """The specification of :func:`weighted_mean`."""
    rows = list(vectors)
    w = torch.as_tensor(weights, dtype=torch.float64)
    total = sum(row.double() * value for row, value in zip(rows, w, strict=True))
    return (total / w.sum()).to(rows[0].dtype)


def weighted_mean(
    vectors: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float], out: Tensor | None = None
) -> Tensor:
    result = weighted_mean_reference(vectors, weights)
    return result if out is None else out.copy_(result)


class Accumulator:
    """Running weighted sum in fp64."""

    def __init__(self, size: int, exact: bool = False) -> None:
        self.sum = torch.zeros(size, dtype=torch.float64)
        self.weight = 0.0

    def add(self, vector: Tensor, weight: float = 1.0) -> None:
        self.sum.add_(vector.double(), alpha=weight)
        self.weight += weight

    def mean(self) -> Tensor:
        return (self.sum / self.weight).float()
