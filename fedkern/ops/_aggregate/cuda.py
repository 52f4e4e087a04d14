"""The aggregate family on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._aggregate.checks import Vectors, deliver, direct_target
from fedkern.ops._aggregate.kernels import ServerRule, Weights
from fedkern.ops._aggregate.plain import PlainAggregate
from fedkern.ops._core import backend
from fedkern.ops._core.backend import DTYPES, address
from fedkern.ops._core.cuda import queue

# Weights as the core takes them: (numbers, their sum, address on the device or None).
_Weights = tuple[list[float], float, int | None]


class CudaAggregate(PlainAggregate):
    """:class:`~fedkern.ops._aggregate.kernels.AggregateKernel` on ``fedkern._cuda``.

    Left to plain PyTorch (inherited): ``server_step`` of more than 128 vectors, distances between more than 64, and
    medians and trimmed means of more than 64 vectors or of weighted fp64.  A list of vectors with different strides is
    copied first.
    """

    def __init__(self, core: Any) -> None:
        self.core = core

    def weighted_mean(self, vectors: Vectors, weights: Weights, out: Tensor | None) -> Tensor:
        if not isinstance(weights, Tensor) and not all(weights):
            kept = [m for m, value in enumerate(weights) if value]
            vectors, weights = [vectors[m] for m in kept], [weights[m] for m in kept]
        uploads, held = _uploads(vectors)
        first = vectors[0]
        dtype, size, count = first.dtype, first.shape[0], len(vectors)
        pointers, strides = _spans(uploads, dtype.itemsize)
        target = direct_target(out, size, dtype, pointers, strides, dtype.itemsize)
        if target is None:
            target = torch.empty(size, dtype=dtype if out is None else out.dtype, device=first.device)
        sums = None
        if count > self.core.aggregate_table:
            sums = torch.empty(size, dtype=torch.float64, device=first.device)
        given, kept_weights = _weights(weights)
        self.core.weighted_mean(
            uploads, given, None, address(sums), target.data_ptr(), DTYPES[target.dtype], queue(first)
        )
        del held, kept_weights
        return target if out is None else deliver(target, out)

    def accumulate(self, total: Tensor, vector: Tensor, weight: float) -> None:
        uploads, _ = _uploads([vector])
        sums = total.data_ptr()
        self.core.weighted_mean(uploads, ([weight], weight, None), sums, sums, None, 0, queue(total))

    def accumulated_mean(self, total: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        target = _target(out, total)
        # No vectors to add: the sum so far, over the weight.
        nothing: tuple[Any, ...] = (DTYPES[torch.float64], len(total), 0, None, 0, 1, [])
        self.core.weighted_mean(
            nothing, ([], weight, None), total.data_ptr(), None, target.data_ptr(), DTYPES[target.dtype], queue(total)
        )
        return target

    def exact_accumulate(self, digits: Tensor, top: Tensor, vector: Tensor, weight: float) -> None:
        self.core.exact_add(
            DTYPES[vector.dtype],
            len(top),
            vector.data_ptr(),
            vector.stride(0),
            weight,
            digits.data_ptr(),
            top.data_ptr(),
            queue(top),
        )

    def exact_mean(self, digits: Tensor, top: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        target = _target(out, top)
        self.core.exact_mean(
            DTYPES[target.dtype],
            len(top),
            digits.data_ptr(),
            top.data_ptr(),
            weight,
            target.data_ptr(),
            queue(top),
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
        count = len(vectors)
        if count > self.core.aggregate_table:
            backend.not_forced("server_step", "cuda", f"of {count} vectors")
            return super().server_step(global_, vectors, weights, rule, first, second, out)
        uploads, held = _uploads(vectors)
        given, kept_weights = _weights(weights)
        model = global_.contiguous()
        target = torch.empty_like(model) if out is None else out
        # Two tensors: an operator's results must not share memory.
        norms, cosines = (torch.empty(count, dtype=torch.float64, device=model.device) for _ in range(2))
        workspace = self._workspace(model)
        self.core.server_step(
            uploads,
            given,
            rule.rule,
            [rule.learning_rate, rule.beta1, rule.beta2, rule.tau],
            [model.data_ptr(), address(first), address(second), target.data_ptr()],
            [0 if x is None else DTYPES[x.dtype] for x in (first, second, target)],
            norms.data_ptr(),
            cosines.data_ptr(),
            workspace.data_ptr(),
            queue(model),
        )
        del held, kept_weights
        return target, norms, cosines

    def sorted_mean(self, vectors: Vectors, low: int, high: int, weights: Weights | None) -> Tensor:
        if not self._sorts(vectors, weights):
            return super().sorted_mean(vectors, low, high, weights)
        return self._sorted(vectors, weights, low, high, False)

    def weighted_median(self, vectors: Vectors, weights: Weights) -> Tensor:
        if not self._sorts(vectors, weights):
            return super().weighted_median(vectors, weights)
        return self._sorted(vectors, weights, 0, len(vectors), True)

    def squared_distances(self, vectors: Vectors) -> Tensor:
        count, first = len(vectors), vectors[0]
        if count > self.core.aggregate_sorted:
            backend.not_forced("distances", "cuda", f"of {count} vectors")
            return super().squared_distances(vectors)
        uploads, held = _uploads(vectors)
        result = torch.empty(count, count, dtype=torch.float64, device=first.device)
        workspace = self._workspace(first)
        self.core.squared_distances(uploads, result.data_ptr(), workspace.data_ptr(), queue(first))
        del held
        return result

    def squared_distances_to(self, vectors: Vectors, point: Tensor) -> Tensor:
        return self._distances(vectors, point)

    def squared_norms(self, vectors: Vectors) -> Tensor:
        return self._distances(vectors, None)

    def scale_and_noise(self, vectors: Vectors, factors: Tensor, deviation: float, seed: int, offset: int) -> Tensor:
        uploads, held = _uploads(vectors)
        first = vectors[0]
        result = torch.empty(len(vectors), first.shape[0], dtype=first.dtype, device=first.device)
        factors = factors.contiguous()
        self.core.scale_and_noise(uploads, factors.data_ptr(), deviation, seed, offset, result.data_ptr(), queue(first))
        del held
        return result

    def _sorts(self, vectors: Vectors, weights: Weights | None) -> bool:
        dtype, count = vectors[0].dtype, len(vectors)
        if count <= self.core.aggregate_sorted and (weights is None or dtype is not torch.float64):
            return True
        weighted = "" if weights is None else "weighted "
        backend.not_forced(f"a {weighted}trimmed mean or median", "cuda", f"of {count} vectors of {dtype}")
        return False

    def _sorted(self, vectors: Vectors, weights: Weights | None, low: int, high: int, median: bool) -> Tensor:
        uploads, held = _uploads(vectors)
        first = vectors[0]
        result = torch.empty(first.shape[0], dtype=first.dtype, device=first.device)
        given, kept_weights = (None, None) if weights is None else _weights(weights)
        self.core.sorted_mean(uploads, given, low, high, median, result.data_ptr(), queue(first))
        del held, kept_weights
        return result

    def _distances(self, vectors: Vectors, point: Tensor | None) -> Tensor:
        uploads, held = _uploads(vectors)
        first = vectors[0]
        result = torch.empty(len(vectors), dtype=torch.float64, device=first.device)
        workspace = self._workspace(first)
        self.core.squared_distances_to(uploads, address(point), result.data_ptr(), workspace.data_ptr(), queue(first))
        del held
        return result

    def _workspace(self, like: Tensor) -> Tensor:
        return torch.empty(self.core.aggregate_workspace, dtype=torch.float64, device=like.device)


def _target(out: Tensor | torch.dtype, like: Tensor) -> Tensor:
    return out if isinstance(out, Tensor) else torch.empty(len(like), dtype=out, device=like.device)


def _uploads(vectors: Vectors) -> tuple[tuple[Any, ...], Any]:
    """Vectors as the core takes them, and the tensors that hold them.

    The core takes (dtype, size, count, first or None, row stride, stride, addresses).  The tensors must stay alive
    until the launch: after it, torch's allocator reuses their memory only in the stream's order.
    """
    if isinstance(vectors, Tensor):
        rows, size = vectors.shape
        return (DTYPES[vectors.dtype], size, rows, vectors.data_ptr(), *vectors.stride(), []), vectors
    size, stride = vectors[0].shape[0], vectors[0].stride(0)
    if any(vector.stride(0) != stride for vector in vectors):
        vectors, stride = [vector.contiguous() for vector in vectors], 1
    addresses = [vector.data_ptr() for vector in vectors]
    return (DTYPES[vectors[0].dtype], size, len(vectors), None, 0, stride, addresses), vectors


def _spans(uploads: tuple[Any, ...], item: int) -> tuple[list[int], list[int]]:
    """Address and stride of each vector."""
    _, _, count, first, row_stride, stride, addresses = uploads
    if first is None:
        return addresses, [stride] * count
    return [first + m * row_stride * item for m in range(count)], [stride] * count


def _weights(weights: Weights) -> tuple[_Weights, Tensor | None]:
    """Weights as the core takes them, and the tensor that must stay alive until the launch."""
    if isinstance(weights, Tensor):
        wide = weights.to(torch.float64).resolve_neg().contiguous()
        return ([], 0.0, wide.data_ptr()), wide
    total = 0.0
    for value in weights:
        total += value
    return (list(weights), total, None), None
