"""Rows of logits: their shapes, reductions of their losses, and how mapped calls fold into them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedkern.ops._core.library import mapped_first

# Reductions of row losses to the result. Schemas of torch.library carry the numbers.
REDUCTIONS = {"none": 0, "sum": 1, "batchmean": 2}
NONE, SUM, BATCHMEAN = 0, 1, 2

# How ensemble_kl combines its teachers: a mixture of probabilities, a mixture of logits, or a mean of divergences.
PROBS, LOGITS, MEAN = 0, 1, 2

# Most dimensions of logits [B, C, *positions] that the core takes.
MAX_DIMS = 9


def row_shape(logits: Tensor) -> torch.Size:
    """``[B, *positions]``."""
    shape = logits.shape
    return shape[:1] + shape[2:]


def row_count(logits: Tensor) -> int:
    """Number of rows, B times positions."""
    return math.prod(row_shape(logits))


def mean_scale(logits: Tensor, reduction: int) -> float:
    """Factor of the sum over rows."""
    count = logits.numel()
    return logits.shape[1] / count if reduction == BATCHMEAN and count else 1.0


# Batching rules fold the mapped axis into the rows, compute a value per row, and reduce afterwards.


def reduce_mapped(rows: Tensor, reduction: int) -> Tensor:
    """The results ``[V, ...]`` from the row losses ``[V, B, *positions]`` of V mapped calls."""
    if reduction == NONE:
        return rows
    total = rows.flatten(1).sum(1)
    return total if reduction == SUM else total / max(rows[0].numel(), 1)


def spread_mapped(grad: Tensor, axis: int | None, count: int, rows: Sequence[int], reduction: int) -> Tensor:
    """grad_output per row, ``[V * B, *positions]``, from those of V mapped calls whose rows have the shape ``rows``."""
    grad = mapped_first(grad, axis, count)
    if reduction != NONE:
        if reduction == BATCHMEAN:
            grad = grad / max(math.prod(rows), 1)
        grad = grad.reshape(count, *[1] * len(rows)).expand(count, *rows)
    return grad.flatten(0, 1)
