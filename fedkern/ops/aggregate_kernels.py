"""aggregate: what a backend implements.

The public functions check their arguments, choose a kernel object and call one of these methods; the operators that are
built from others (krum, geometric_median, clip_by_norm) are written on them once for all backends.
:class:`~fedkern.ops.aggregate_plain.PlainAggregate` is the same interface in plain PyTorch: the reference, and what a
backend inherits for methods that it does not write itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedkern.ops.aggregate_checks import Vectors

#: Checked, finite, not negative, of positive sum; or, for vectors on a GPU, a tensor ``[M]`` there of unchecked values.
Weights = Sequence[float] | Tensor

RULES = ("mean", "momentum", "adam", "yogi", "adagrad")


class ServerRule(NamedTuple):
    """A server optimiser: its place in :data:`RULES` and its numbers."""

    rule: int
    learning_rate: float
    beta1: float
    beta2: float
    tau: float


class AggregateKernel(Protocol):
    """``vectors`` are M >= 1 tensors ``[P]`` or one ``[M, P]`` of one dtype and device, of any strides; P may be 0.

    Results are fresh and contiguous unless an argument takes them.  All sums are taken in fp64, in a fixed order.
    A method that takes ``out`` finds it of unit stride, of any of the four dtypes, and unless it says otherwise without
    overlap with its inputs.
    """

    def weighted_mean(self, vectors: Vectors, weights: Weights, out: Tensor | None) -> Tensor:
        """``sum_m w_m x_m / sum_m w_m``, m ascending; a vector of weight zero is skipped.

        ``out`` is as in :func:`fedkern.ops.weighted_mean`, of any stride and overlap; the sums are rounded to its
        dtype and to no other.  Weights of sum zero give NaN.
        """
        ...

    def accumulate(self, total: Tensor, vector: Tensor, weight: float) -> None:
        """``total += weight * vector`` for ``total`` fp64 ``[P]``, product and sum each rounded."""
        ...

    def accumulated_mean(self, total: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        """``total / weight`` in ``out``, or fresh of that dtype."""
        ...

    def exact_accumulate(self, digits: Tensor, top: Tensor, vector: Tensor, weight: float) -> None:
        """Adds ``weight * vector`` to the digits ``int64 [3, P]`` and their positions ``int8 [P]``; see aggregate.h."""
        ...

    def exact_mean(self, digits: Tensor, top: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        """The digits' sum over ``weight`` in ``out``, or fresh of that dtype."""
        ...

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
        """One round of a server optimiser, in one pass over ``vectors``; see :func:`fedkern.ops.server_step`.

        ``global_ [P]`` of the vectors' dtype and any stride; ``first`` and ``second [P]``, fp32 or fp64 of unit stride,
        are updated in place (None where the rule has none); ``out`` may be ``global_``.

        Returns:
            ``out`` or a fresh model of the vectors' dtype, the M norms of the deltas and their M cosines to the mean
            delta in fp64.
        """
        ...

    def sorted_mean(self, vectors: Vectors, low: int, high: int, weights: Weights | None) -> Tensor:
        """The (weighted) mean of the values at places ``low <= k < high`` of every coordinate's ascending order.

        Equal values stay in the order of the vectors, and NaN is larger than every number.  Remaining weights of sum
        zero give NaN.
        """
        ...

    def weighted_median(self, vectors: Vectors, weights: Weights) -> Tensor:
        """See :func:`fedkern.ops.median`: the mean of the lower and the upper weighted median."""
        ...

    def squared_distances(self, vectors: Vectors) -> Tensor:
        """fp64 ``[M, M]``: sums of squared differences, taken before squaring; exactly symmetric, diagonal 0."""
        ...

    def distances(self, vectors: Vectors) -> Tensor:
        """The square roots of :meth:`squared_distances`."""
        ...

    def squared_distances_to(self, vectors: Vectors, point: Tensor) -> Tensor:
        """fp64 ``[M]``: the squared distances to ``point``, fp64 ``[P]`` of unit stride."""
        ...

    def squared_norms(self, vectors: Vectors) -> Tensor:
        """fp64 ``[M]``."""
        ...

    def clip_and_noise(self, vectors: Vectors, max_norm: float, deviation: float, seed: int, offset: int) -> Tensor:
        """:meth:`scale_and_noise` with the factors ``min(1, max_norm / |x_m|)``."""
        ...

    def scale_and_noise(self, vectors: Vectors, factors: Tensor, deviation: float, seed: int, offset: int) -> Tensor:
        """``[M, P]``: ``factors[m] * x_m + deviation * normal(seed, offset + m * P + j)``; no noise at deviation 0.

        ``factors`` fp64 ``[M]`` on the vectors' device; ``seed`` and ``offset`` in [0, 2^64).  The counter-based normal
        numbers are those of :func:`fedkern.ops.aggregate_philox.normal`, to the rounding of log, sine and cosine in
        fp32.
        """
        ...
