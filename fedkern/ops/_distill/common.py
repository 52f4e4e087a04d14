"""Shared by the distill operators: argument checks, reductions, shapes of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import DTYPES
from fedkern.ops._core.checks import check_dense, real, shown

# Reductions of row losses to the result. Schemas of torch.library carry the numbers.
REDUCTIONS = {"none": 0, "sum": 1, "batchmean": 2}
NONE, SUM, BATCHMEAN = 0, 1, 2

# How ensemble_kl combines its teachers: a mixture of probabilities, a mixture of logits, or a mean of divergences.
PROBS, LOGITS, MEAN = 0, 1, 2

# Most dimensions of logits [B, C, *positions] that the core takes.
MAX_DIMS = 9


# Checks in detail. The public functions first test all in one fast step, and need most of these only where it fails.


def check_logits(names: tuple[str, ...], tensors: tuple[Any, ...]) -> None:
    """Raises TypeError or ValueError unless all are logits ``[B, C, *positions]`` of one shape on one device."""
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor of logits, but got {type(tensor).__name__}")
        check_dense(tensor, name)
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must have dtype float32, float64, bfloat16 or float16, but has {tensor.dtype}")
        if not 2 <= tensor.dim() <= MAX_DIMS or tensor.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape [B, C] or [B, C, *positions] with at least one class, but has "
                f"{list(tensor.shape)}"
            )
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"{name} must have the shape {list(tensors[0].shape)} of {names[0]}, but has {list(tensor.shape)}"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(f"{name} must be on {tensors[0].device} like {names[0]}, but is on {tensor.device}")


def check_weight(weight: Any, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``weight`` in the shape of the rows, ``[B, *positions]``, and a floating dtype."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, but got {type(weight).__name__}")
    check_dense(weight, "weight")
    if weight.dtype is torch.bool:
        weight = weight.to(dtype)
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must have dtype bool, float32, float64, bfloat16 or float16, but has {weight.dtype}")
    if weight.device != logits.device:
        raise ValueError(f"weight must be on {logits.device} like the logits, but is on {weight.device}")
    rows = row_shape(logits)
    if weight.shape == rows:
        return weight
    if weight.shape == rows[:1]:
        if weight.requires_grad and weight.dtype.itemsize == 2:
            weight = weight.float()  # its gradient is a sum over positions, rounded once
        return weight.reshape(-1, *[1] * (len(rows) - 1)).expand(rows)
    expected = f"{list(rows[:1])} or {list(rows)}" if len(rows) > 1 else f"{list(rows)}"
    raise ValueError(f"weight must have shape {expected}, one value per row, but has {list(weight.shape)}")


def check_temperature(temperature: Any) -> float:
    """Returns ``temperature`` as a float above 0, infinity included."""
    if isinstance(temperature, (Tensor, bool)):
        raise TypeError(f"temperature must be a number, not {type(temperature).__name__}")
    value = real(temperature, "temperature")
    if not value > 0:
        raise ValueError(f"temperature must be above 0 (math.inf for the limit), but is {shown(temperature)}")
    return value


def check_reduction(reduction: Any) -> int:
    """Returns the number of a reduction's name."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "none", "sum" or "batchmean", but is {reduction!r}')
    return REDUCTIONS[reduction]


def row_shape(logits: Tensor) -> torch.Size:
    """``[B, *positions]``."""
    shape = logits.shape
    return shape[:1] + shape[2:]


def row_count(logits: Tensor) -> int:
    """Number of rows, B times positions."""
    return math.prod(row_shape(logits))


def mean_scale(logits: Tensor, reduction: int, axis: int = 1) -> float:
    """Factor of the sum over rows; ``axis`` is the class axis."""
    if reduction != BATCHMEAN:
        return 1.0
    count = logits.numel()
    return logits.shape[axis] * (logits.shape[0] if axis == 2 else 1) / count if count else 1.0


# Batching rules fold the mapped axis into the rows, compute a value per row, and reduce afterwards.


def unmapped(tensor: Tensor, axis: int | None, count: int) -> Tensor:
    """``tensor`` as ``[V, ...]``: the mapped axis in front, or V repetitions of an unmapped tensor."""
    return tensor.expand(count, *tensor.shape) if axis is None else tensor.movedim(axis, 0)


def reduce_mapped(rows: Tensor, reduction: int) -> Tensor:
    """The results ``[V, ...]`` from the row losses ``[V, B, *positions]`` of V mapped calls."""
    if reduction == NONE:
        return rows
    total = rows.flatten(1).sum(1)
    return total if reduction == SUM else total / max(rows[0].numel(), 1)


def spread_mapped(grad: Tensor, axis: int | None, count: int, rows: Sequence[int], reduction: int) -> Tensor:
    """grad_output per row, ``[V * B, *positions]``, from those of V mapped calls whose rows have the shape ``rows``."""
    grad = unmapped(grad, axis, count)
    if reduction != NONE:
        if reduction == BATCHMEAN:
            grad = grad / max(math.prod(rows), 1)
        grad = grad.reshape(count, *[1] * len(rows)).expand(count, *rows)
    return grad.flatten(0, 1)
