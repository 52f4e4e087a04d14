"""aggregate: addresses and strides of vectors, and weights as numbers."""

from __future__ import annotations

from torch import Tensor

from fedkern.ops._aggregate.checks import Vectors
from fedkern.ops._aggregate.kernels import Weights


def numbers(weights: Weights) -> tuple[list[float], float]:
    """Returns the weights, and their running sum (not ``sum()``, which compensates rounding since Python 3.12)."""
    values = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    total = 0.0
    for value in values:
        total += value
    return values, total


def addresses(vectors: Vectors) -> tuple[list[int], list[int]]:
    """Returns the address of each vector, and its stride in elements."""
    if not isinstance(vectors, Tensor):
        return [row.data_ptr() for row in vectors], [row.stride(0) for row in vectors]
    step = vectors.stride(0) * vectors.element_size()
    first = vectors.data_ptr()
    count = vectors.shape[0]
    return [first + m * step for m in range(count)], [vectors.stride(1)] * count


def unit_addresses(vectors: Vectors) -> tuple[list[int], Vectors]:
    """Returns the address of each vector with stride one, and the tensors that must stay alive while it is used.

    A vector of another stride is copied first.
    """
    size = vectors[0].shape[0]
    if isinstance(vectors, Tensor):
        kept = vectors if size <= 1 or vectors.stride(1) == 1 else vectors.contiguous()
        return addresses(kept)[0], kept
    rows = [row if size <= 1 or row.stride(0) == 1 else row.contiguous() for row in vectors]
    return [row.data_ptr() for row in rows], rows
