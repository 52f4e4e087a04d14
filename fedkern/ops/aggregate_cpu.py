"""aggregate: from tensors to the pointers, sizes and strides of the compiled CPU kernels."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fedkern.ops import backend
from fedkern.ops._memory import fresh
from fedkern.ops.aggregate_checks import Vectors, deliver, direct_target
from fedkern.ops.aggregate_kernels import ServerRule, Weights
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

    def server_step(
        self,
        global_: Tensor,
        vectors: Vectors,
        weights: Weights,
        rule: ServerRule,
        first: Tensor | None,
        second: Tensor | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, total = numbers(weights)
        pointers, kept = unit_addresses(vectors)
        old = global_.contiguous()
        dtype, size = old.dtype, len(old)
        target = self._target(dtype if out is None else out, size)
        norms, cosines = (torch.empty(len(values), dtype=torch.float64) for _ in range(2))
        self.core.server_step(
            backend.DTYPES[dtype],
            backend.DTYPES[torch.float32 if first is None else first.dtype],
            backend.DTYPES[target.dtype],
            size,
            old.data_ptr(),
            pointers,
            values,
            total,
            *rule,
            0 if first is None else first.data_ptr(),
            0 if second is None else second.data_ptr(),
            target.data_ptr(),
            norms.data_ptr(),
            cosines.data_ptr(),
            torch.get_num_threads(),
        )
        del kept
        return target, norms, cosines

    def sorted_mean(self, vectors: Vectors, low: int, high: int, weights: Weights | None) -> Tensor:
        return self._sorted_mean(vectors, low, high, [] if weights is None else numbers(weights)[0], 0.0)

    def weighted_median(self, vectors: Vectors, weights: Weights) -> Tensor:
        values, total = numbers(weights)
        return self._sorted_mean(vectors, 0, len(values), values, total / 2)

    def _sorted_mean(self, vectors: Vectors, low: int, high: int, weights: list[float], half: float) -> Tensor:
        pointers, kept = unit_addresses(vectors)
        dtype, size = vectors[0].dtype, vectors[0].shape[0]
        target = self._target(dtype, size)
        self.core.sorted_mean(
            backend.DTYPES[dtype], size, pointers, low, high, weights, half, target.data_ptr(), torch.get_num_threads()
        )
        del kept
        return target

    def squared_distances(self, vectors: Vectors) -> Tensor:
        pointers, kept = unit_addresses(vectors)
        result = torch.zeros(len(pointers), len(pointers), dtype=torch.float64)
        self.core.squared_distances(
            backend.DTYPES[vectors[0].dtype], vectors[0].shape[0], pointers, result.data_ptr(), torch.get_num_threads()
        )
        del kept
        return result

    def squared_distances_to(self, vectors: Vectors, point: Tensor) -> Tensor:
        return self._squared_distances_to(vectors, point.data_ptr())

    def squared_norms(self, vectors: Vectors) -> Tensor:
        return self._squared_distances_to(vectors, 0)

    def _squared_distances_to(self, vectors: Vectors, point: int) -> Tensor:
        pointers, kept = unit_addresses(vectors)
        result = torch.zeros(len(pointers), dtype=torch.float64)
        self.core.squared_distances_to(
            backend.DTYPES[vectors[0].dtype],
            vectors[0].shape[0],
            pointers,
            point,
            result.data_ptr(),
            torch.get_num_threads(),
        )
        del kept
        return result

    def scale_and_noise(self, vectors: Vectors, factors: Tensor, deviation: float, seed: int, offset: int) -> Tensor:
        pointers, kept = unit_addresses(vectors)
        dtype, size = vectors[0].dtype, vectors[0].shape[0]
        result = fresh(self.core, torch.empty(len(pointers), size, dtype=dtype))
        self.core.scale_and_noise(
            backend.DTYPES[dtype],
            size,
            pointers,
            factors.data_ptr(),
            deviation,
            seed,
            offset,
            result.data_ptr(),
            torch.get_num_threads(),
        )
        del kept
        return result

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


def unit_addresses(vectors: Vectors) -> tuple[list[int], Vectors]:
    """Where each vector begins, copied first where its stride is not one; and what must be kept alive meanwhile."""
    size = vectors[0].shape[0]
    if isinstance(vectors, Tensor):
        kept = vectors if size <= 1 or vectors.stride(1) == 1 else vectors.contiguous()
        return addresses(kept)[0], kept
    rows = [row if size <= 1 or row.stride(0) == 1 else row.contiguous() for row in vectors]
    return [row.data_ptr() for row in rows], rows
