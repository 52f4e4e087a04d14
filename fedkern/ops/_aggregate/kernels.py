"""aggregate: the calls of both compiled cores.

Operators built from others (krum, geometric_median, clip_by_norm) are written once, on these methods.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._aggregate.checks import (
    TINY,
    Vectors,
    Weights,
    check_weights,
    copy_result,
    count_of,
    rows_or_stack,
    size_of,
)
from fedkern.ops._aggregate.plain import PlainAggregate
from fedkern.ops._aggregate.rules import ServerCall
from fedkern.ops._core import backend
from fedkern.ops._core.launch import Launcher

# Templates for empty_like, by number of clients: it takes two thirds of the time of empty(count, dtype=...).
_NUMBERS: dict[int, Tensor] = {}
_empty_like = torch.empty_like

# Longest vector, in elements, that stays in a CPU core's caches between its norm and its scaling (csrc/bindings).
SHORT = 16384
MAX_ITERATIONS = 100_000  # of one kernel, which cannot be interrupted


class AggregateKernels(PlainAggregate, Launcher):
    """:class:`PlainAggregate`, which specifies the methods, on a compiled core.

    On a GPU plain PyTorch computes ``server_step`` of more than 128 vectors, distances between more than 64, and
    medians and trimmed means of more than 64 vectors or of weighted fp64.
    """

    def __init__(self, core: ModuleType) -> None:
        super().__init__(core)
        self.host = not self.gpu

    def numbers(self, weights: Any, count: int) -> list[float]:
        """Check ordinary numbers in one call of the core, other weights by ``check_weights``."""
        values: list[float] | None = self.core.plain_weights(weights, count)
        return values if values and max(values) > TINY else check_weights(weights, count)[0]

    def weighted_mean(self, vectors: Vectors, weights: Weights, out: Tensor | None) -> Tensor:
        if out is None:
            target = self._vector(vectors)
        elif out.is_neg() or not self.core.writable((out,), (), vectors):
            target = self._new(len(out), out.dtype, out)
        else:
            target = out
        several = self.gpu and count_of(vectors) > self.core.aggregate_table
        sums = torch.empty(target.shape, dtype=torch.float64, device=target.device) if several else None
        self._call(self.core.weighted_mean, vectors, self._weights(weights), target, sums, self.at(target))
        return target if out is None else copy_result(target, out)

    def accumulate(self, total: Tensor, vector: Tensor, weight: float) -> None:
        self.core.accumulator_add(vector, weight, total, self.at(total))

    def accumulated_mean(self, total: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        target = out if isinstance(out, Tensor) else self._new(len(total), out, total)
        self.core.accumulator_mean(total, weight, target, self.at(total))
        return target

    def exact_accumulate(self, digits: Tensor, top: Tensor, vector: Tensor, weight: float) -> None:
        self.core.exact_add(vector, weight, digits, top, self.at(top))

    def exact_mean(self, digits: Tensor, top: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        target = out if isinstance(out, Tensor) else self._new(len(top), out, top)
        self.core.exact_mean(digits, top, weight, target, self.at(top))
        return target

    def server_step(self, call: ServerCall) -> tuple[Tensor, Tensor, Tensor]:
        global_, vectors, weights, rule, *moments, out, similarities = call
        count = count_of(vectors)
        if self.gpu and count > self.core.aggregate_table:
            backend.not_forced("server_step", "cuda", f"of {count} vectors")
            return super().server_step(call)
        old = global_.contiguous()
        target = self.fresh(_empty_like(old)) if out is None else out
        # Two tensors: an operator's results must not share memory.
        taken = similarities or self.host  # by the CPU's kernel in any case, from what is in its caches
        norms, cosines = (self._per_vector(count if taken else 0, old) for _ in range(2))
        self._call(
            self.core.server_step, vectors, self._weights(weights), old, *rule, *moments, target,
            *((norms, cosines, self._workspace(old)) if taken else (None, None, None)), self.at(old),
        )  # fmt: skip
        return (target, norms, cosines) if similarities else (target, norms[:0], cosines[:0])

    def sorted_mean(self, vectors: Vectors, low: int, high: int, weights: Weights | None) -> Tensor:
        if self.gpu and not self._sorts(vectors, weights):
            return super().sorted_mean(vectors, low, high, weights)
        return self._call_sorted(vectors, low, high, weights, False)

    def weighted_median(self, vectors: Vectors, weights: Weights) -> Tensor:
        if self.gpu and not self._sorts(vectors, weights):
            return super().weighted_median(vectors, weights)
        return self._call_sorted(vectors, 0, count_of(vectors), weights, True)

    def _sorts(self, vectors: Vectors, weights: Weights | None) -> bool:
        dtype, count = rows_or_stack(vectors)[0].dtype, count_of(vectors)
        if count <= self.core.aggregate_sorted and (weights is None or dtype is not torch.float64):
            return True
        weighted = "" if weights is None else "weighted "
        backend.not_forced(f"a {weighted}trimmed mean or median", "cuda", f"of {count} vectors of {dtype}")
        return False

    def _call_sorted(self, vectors: Vectors, low: int, high: int, weights: Weights | None, median: bool) -> Tensor:
        result = self._vector(vectors)
        numbers = None if weights is None else self._weights(weights)
        self._call(self.core.sorted_mean, vectors, low, high, numbers, median, result, self.at(result))
        return result

    def squared_distances(self, vectors: Vectors) -> Tensor:
        return self._distances(vectors, False)

    def distances(self, vectors: Vectors) -> Tensor:
        return self._distances(vectors, True)

    def _distances(self, vectors: Vectors, root: bool) -> Tensor:
        count = count_of(vectors)
        if self.gpu and count > self.core.aggregate_sorted:
            backend.not_forced("distances", "cuda", f"of {count} vectors")
            squared = super().squared_distances(vectors)
            return squared.sqrt_() if root else squared
        sample = rows_or_stack(vectors)[0]
        result = torch.empty(count, count, dtype=torch.float64, device=sample.device)
        self._call(self.core.squared_distances, vectors, root, result, self._workspace(sample), self.at(sample))
        return result

    def squared_distances_to(self, vectors: Vectors, point: Tensor | None) -> Tensor:
        sample = rows_or_stack(vectors)[0]
        result = self._per_vector(count_of(vectors), sample)
        self._call(self.core.squared_distances_to, vectors, point, result, self._workspace(sample), self.at(sample))
        return result

    def krum_shares(self, vectors: Vectors, byzantine: int, keep: int) -> Tensor | None:
        if self.host or count_of(vectors) > self.core.aggregate_sorted:
            return None
        sample = rows_or_stack(vectors)[0]
        shares = self._per_vector(count_of(vectors), sample)
        self._call(self.core.krum_shares, vectors, byzantine, keep, shares, self._workspace(sample), self.at(sample))
        return shares

    def geometric_shares(
        self, vectors: Vectors, weights: Tensor, iterations: int, tolerance: float, smoothing: float
    ) -> Tensor | None:
        if self.host or count_of(vectors) > self.core.aggregate_sorted or iterations > MAX_ITERATIONS:
            return None
        settings = iterations, tolerance, smoothing
        numbers, shares = self._weights(weights), self._per_vector(count_of(vectors), weights)
        self._call(
            self.core.geometric_shares, vectors, numbers, *settings, shares, self._workspace(shares), self.at(shares)
        )
        return shares

    def clip_and_noise(self, vectors: Vectors, max_norm: float, deviation: float, seed: int, offset: int) -> Tensor:
        # On the CPU short vectors are scaled, and get noise, while they are cached from taking their norm.
        if self.gpu or size_of(vectors) > SHORT:
            return super().clip_and_noise(vectors, max_norm, deviation, seed, offset)
        result = self._matrix(vectors)
        self._call(self.core.clip_short, vectors, max_norm, deviation, seed, offset, result, self.at(result))
        return result

    def scale_and_noise(self, vectors: Vectors, factors: Tensor, deviation: float, seed: int, offset: int) -> Tensor:
        result, scales = self._matrix(vectors), factors.contiguous()
        self._call(self.core.scale_and_noise, vectors, scales, deviation, seed, offset, result, self.at(result))
        return result

    def scale_each(
        self, vectors: Sequence[Tensor], factors: Tensor, deviation: float, seed: int, offset: int
    ) -> list[Tensor]:
        results = [_empty_like(vector, memory_format=torch.contiguous_format) for vector in vectors]
        scales = factors.contiguous()
        self._call(self.core.scale_and_noise, vectors, scales, deviation, seed, offset, results, self.at(results[0]))
        return results

    def _call(self, function: Callable[..., bool], vectors: Vectors, *others: Any) -> None:
        """Call a function of the core with the vectors, or with copies of unsuitable strides.

        CPU kernels take unit strides (``weighted_mean`` any), GPU kernels any stride that all vectors share.
        """
        if not function(vectors, *others):
            copied = vectors.contiguous() if isinstance(vectors, Tensor) else [row.contiguous() for row in vectors]
            served = function(copied, *others)
            assert served

    def _weights(self, weights: Weights) -> list[float] | Tensor:
        if not isinstance(weights, Tensor):
            return weights if type(weights) is list else list(weights)
        if self.host:
            return weights.tolist()
        return weights.to(torch.float64).resolve_neg().contiguous()

    def _new(self, size: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        return self.fresh(torch.empty(size, dtype=dtype, device=like.device))

    def _vector(self, vectors: Vectors) -> Tensor:
        if isinstance(vectors, Tensor):
            return self.fresh(vectors.new_empty(vectors.shape[1]))
        return self.fresh(_empty_like(vectors[0]))

    def _matrix(self, vectors: Vectors) -> Tensor:
        if isinstance(vectors, Tensor):
            return self.fresh(_empty_like(vectors, memory_format=torch.contiguous_format))
        return self.fresh(vectors[0].new_empty(len(vectors), size_of(vectors)))

    def _per_vector(self, count: int, like: Tensor) -> Tensor:
        if self.gpu:
            return torch.empty(count, dtype=torch.float64, device=like.device)
        if count not in _NUMBERS:
            _NUMBERS[count] = torch.empty(count, dtype=torch.float64, device="cpu")
        return _empty_like(_NUMBERS[count])

    def _workspace(self, like: Tensor) -> Tensor | None:
        if not self.gpu:
            return None
        return torch.empty(self.core.aggregate_workspace, dtype=torch.float64, device=like.device)
