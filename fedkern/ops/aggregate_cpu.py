"""aggregate: from tensors to the pointers, sizes and strides of the compiled CPU kernels."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fedkern.ops import backend
from fedkern.ops._memory import fresh
from fedkern.ops.aggregate_checks import Vectors, deliver, direct_target
from fedkern.ops.aggregate_kernels import Weights
from fedkern.ops.aggregate_plain import PlainAggregate


class CpuAggregate(PlainAggregate):
    """:class:`~fedkern.ops.aggregate_kernels.AggregateKernel` on ``fedkern._cpu``."""

    def __init__(self, core: ModuleType) -> None:
        self.core = core

    def weighted_mean(self, vectors: Vectors, weights: Weights, out: Tensor | None) -> Tensor:
        values, total = numbers(weights)
        pointers, strides = addresses(vectors)
        if not all(values):
            kept = [m for m, value in enumerate(values) if value]
            pointers, strides = [pointers[m] for m in kept], [strides[m] for m in kept]
            values = [values[m] for m in kept]
        dtype, size = vectors[0].dtype, vectors[0].shape[0]
        target = direct_target(out, size, dtype, pointers, strides, dtype.itemsize)
        if target is None:
            target = fresh(self.core, torch.empty(size, dtype=dtype))
        self.core.weighted_mean(
            backend.DTYPES[dtype],
            backend.DTYPES[target.dtype],
            size,
            pointers,
            strides,
            values,
            total,
            target.data_ptr(),
            torch.get_num_threads(),
        )
        return target if out is None else deliver(target, out)

    def accumulate(self, total: Tensor, vector: Tensor, weight: float) -> None:
        self.core.accumulator_add(
            backend.DTYPES[vector.dtype],
            len(total),
            vector.data_ptr(),
            vector.stride(0),
            weight,
            total.data_ptr(),
            torch.get_num_threads(),
        )

    def accumulated_mean(self, total: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        target = self._target(out, len(total))
        self.core.accumulator_mean(
            backend.DTYPES[target.dtype],
            len(total),
            total.data_ptr(),
            weight,
            target.data_ptr(),
            torch.get_num_threads(),
        )
        return target

    def exact_accumulate(self, digits: Tensor, top: Tensor, vector: Tensor, weight: float) -> None:
        self.core.exact_add(
            backend.DTYPES[vector.dtype],
            len(top),
            vector.data_ptr(),
            vector.stride(0),
            weight,
            digits.data_ptr(),
            top.data_ptr(),
            torch.get_num_threads(),
        )

    def exact_mean(self, digits: Tensor, top: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        target = self._target(out, len(top))
        self.core.exact_mean(
            backend.DTYPES[target.dtype],
            len(top),
            digits.data_ptr(),
            top.data_ptr(),
            weight,
            target.data_ptr(),
            torch.get_num_threads(),
        )
        return target

    def _target(self, out: Tensor | torch.dtype, size: int) -> Tensor:
        return out if isinstance(out, Tensor) else fresh(self.core, torch.empty(size, dtype=out))


def numbers(weights: Weights) -> tuple[list[float], float]:
    """The weights, and their running sum (not sum(), which compensates since Python 3.12)."""
    values = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    total = 0.0
    for value in values:
        total += value
    return values, total


def addresses(vectors: Vectors) -> tuple[list[int], list[int]]:
    """Where each vector begins, and its stride in elements."""
    if not isinstance(vectors, Tensor):
        return [row.data_ptr() for row in vectors], [row.stride(0) for row in vectors]
    step = vectors.stride(0) * vectors.element_size()
    first = vectors.data_ptr()
    count = vectors.shape[0]
    return [first + m * step for m in range(count)], [vectors.stride(1)] * count
