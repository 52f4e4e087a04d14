"""aggregate: the kernels' interface, in plain PyTorch on any device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedkern.ops._aggregate import reference
from fedkern.ops._aggregate import robust_reference as robust
from fedkern.ops._aggregate.checks import Vectors, Weights, copy_result, rows_or_stack, size_of
from fedkern.ops._aggregate.rules import ServerCall

# Sums of squares below this have lost digits to the end of fp64's range (csrc/bindings/cpu_aggregate_privacy.cpp).
_MIN_SQUARE = 1e-280


class PlainAggregate:
    """Interface of the aggregation kernels, implemented by the references.

    ``vectors`` are M >= 1 tensors ``[P]`` or one ``[M, P]``, of one dtype and device and any strides; P may be 0. Sums
    are taken in fp64, in a fixed order. Results are new and contiguous unless an ``out`` receives them, of unit stride,
    any of the four dtypes, and without overlap unless stated.

    Attributes:
        host: whether the host may look at results; on a GPU it would wait for them.
    """

    host = False  # on any device

    def weighted_mean(self, vectors: Vectors, weights: Weights, out: Tensor | None) -> Tensor:
        """Compute ``sum_m w_m x_m / sum_m w_m``, m ascending, skipping vectors of weight zero.

        ``out`` may have any stride and overlap the vectors. Weights of sum zero give NaN.
        """
        dtype = None if out is None else out.dtype
        if isinstance(weights, Tensor):
            result = reference.weighted_mean_reference(vectors, weights, dtype)
        else:
            result = reference.mean_in_pieces(vectors, weights, dtype)
        return result if out is None else copy_result(result, out)

    def accumulate(self, total: Tensor, vector: Tensor, weight: float) -> None:
        """Add ``weight * vector`` to ``total``, fp64 ``[P]``, rounding product and sum."""
        reference.add_reference(total, vector, weight)

    def accumulated_mean(self, total: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        target = _target(out, total)
        if target.dtype == torch.float64:
            return torch.div(total, weight, out=target)
        return target.copy_(total / weight)

    def exact_accumulate(self, digits: Tensor, top: Tensor, vector: Tensor, weight: float) -> None:
        """Add ``weight * vector`` to the digits ``int64 [3, P]`` and positions ``int8 [P]`` of aggregate.h."""
        reference.exact_add_reference(digits, top, vector, weight)

    def exact_mean(self, digits: Tensor, top: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        target = _target(out, top)
        reference.exact_mean_reference(digits, top, weight, target)
        return target

    def server_step(self, call: ServerCall) -> tuple[Tensor, Tensor, Tensor]:
        """Perform one round of a server optimiser, where ``call.out`` may be ``call.global_``.

        Returns:
            ``out`` or a new model, and with ``similarities`` the deltas' norms and cosines to the mean delta, fp64
            ``[M]``.
        """
        target = _target(call.global_.dtype if call.out is None else call.out, call.global_)
        return target, *robust.server_step_reference(call, target)

    def sorted_mean(self, vectors: Vectors, low: int, high: int, weights: Weights | None) -> Tensor:
        """Return the (weighted) mean of places ``low <= k < high`` in every coordinate's ascending order.

        Equal values stay in order, and NaN is largest. Values of total weight zero give NaN.
        """
        return robust.sorted_mean_reference(vectors, low, high, weights)

    def weighted_median(self, vectors: Vectors, weights: Weights) -> Tensor:
        return robust.weighted_median_reference(vectors, weights)

    def squared_distances(self, vectors: Vectors) -> Tensor:
        """Sum the squared differences (subtracted first), fp64 ``[M, M]``, exactly symmetric."""
        return robust.squared_distances_reference(vectors)

    def distances(self, vectors: Vectors) -> Tensor:
        return self.squared_distances(vectors).sqrt_()

    def squared_distances_to(self, vectors: Vectors, point: Tensor | None) -> Tensor:
        """Return the squared distances to ``point`` (fp64 ``[P]`` of unit stride, or None for 0), fp64 ``[M]``."""
        if point is None:
            point = torch.zeros_like(vectors[0], dtype=torch.float64)
        return robust.squared_distances_to_reference(vectors, point)

    def krum_shares(self, vectors: Vectors, byzantine: int, keep: int) -> Tensor | None:
        """Return 1 for vectors that Krum keeps, else 0, fp64 ``[M]``, all NaN if a kept score is infinite.

        None if no kernel computes them.
        """
        return None

    def geometric_shares(
        self, vectors: Vectors, weights: Tensor, iterations: int, tolerance: float, smoothing: float
    ) -> Tensor | None:
        """Return the vectors' shares in their geometric median, fp64 ``[M]``, or None without a kernel.

        ``weights``: fp64 ``[M]`` on the vectors' device. ``iterations`` is at least 1.
        """
        return None

    def squared_norms(self, vectors: Vectors) -> Tensor:
        return self.squared_distances_to(vectors, None)

    def clip_and_noise(self, vectors: Vectors, max_norm: float, deviation: float, seed: int, offset: int) -> Tensor:
        return self.scale_and_noise(vectors, self.clip_factors(vectors, max_norm, deviation), deviation, seed, offset)

    def clip_factors(self, vectors: Vectors, max_norm: float, deviation: float) -> Tensor:
        """Return ``min(1, max_norm / |x_m|)``, fp64 ``[M]``, without noise a little less for 16-bit vectors."""
        factors = self._factors(vectors, max_norm)
        dtype = rows_or_stack(vectors)[0].dtype
        if dtype.itemsize == 2 and not deviation:  # what rounding may add to a norm; noise has no bound to keep
            factors = torch.where(factors < 1, factors * (1 - torch.finfo(dtype).eps / 2), factors)
        return factors

    def _factors(self, vectors: Vectors, max_norm: float) -> Tensor:
        squares = self.squared_norms(vectors)
        factors = (max_norm / squares.sqrt()).clamp_max_(1.0)
        if rows_or_stack(vectors)[0].dtype != torch.float64 or not size_of(vectors):
            return factors
        outside = (squares < _MIN_SQUARE) | squares.isinf()
        if outside.device.type == "cpu" and not bool(outside.any()):
            return factors
        largest = torch.stack([vector.abs().max() for vector in vectors])
        usable = (largest > 0) & (largest < math.inf)
        scales = torch.where(usable, largest, 1.0)
        beside = torch.stack([(vector / scale).square().sum() for vector, scale in zip(vectors, scales, strict=True)])
        return torch.where(outside & usable, (max_norm / scales / beside.sqrt()).clamp_max_(1.0), factors)

    def scale_and_noise(self, vectors: Vectors, factors: Tensor, deviation: float, seed: int, offset: int) -> Tensor:
        """Compute ``factors[m] * x_m + deviation * normal(seed, offset + m * P + j)``, ``[M, P]``.

        ``factors``: fp64 ``[M]`` on the vectors' device; ``seed`` and ``offset`` lie in [0, 2^64).
        """
        return torch.stack(list(robust.scale_and_noise_reference(vectors, factors, deviation, seed, offset)))

    def scale_each(
        self, vectors: Sequence[Tensor], factors: Tensor, deviation: float, seed: int, offset: int
    ) -> list[Tensor]:
        return [
            self.scale_and_noise([vector], factor, deviation, seed, (offset + m * len(vector)) % (1 << 64))[0]
            for m, (vector, factor) in enumerate(zip(vectors, factors.split(1), strict=True))
        ]


def _target(out: Tensor | torch.dtype, like: Tensor) -> Tensor:
    return out if isinstance(out, Tensor) else torch.empty(len(like), dtype=out, device=like.device)


PLAIN = PlainAggregate()
