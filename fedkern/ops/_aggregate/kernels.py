"""aggregate: the kernel interface that a backend implements.

The public functions check their arguments, choose a kernel object and call one of these methods.  Operators built from
others (krum, geometric_median, clip_by_norm) use these methods and are written once for all backends.
:class:`~fedkern.ops._aggregate.plain.PlainAggregate` has the same interface in plain PyTorch.  It is the reference, and
a backend inherits from it the methods that it does not implement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedkern.ops._aggregate.checks import Vectors

#: Checked numbers: finite, not negative, of positive sum.  For vectors on a GPU also a tensor ``[M]`` there, unchecked.
Weights = Sequence[float] | Tensor

RULES = ("mean", "momentum", "adam", "yogi", "adagrad")


class ServerRule(NamedTuple):
    """A server optimiser: the index of its rule in :data:`RULES`, and its hyperparameters."""

    rule: int
    learning_rate: float
    beta1: float
    beta2: float
    tau: float


class AggregateKernel(Protocol):
    """One backend's aggregation kernels.

    ``vectors`` are M >= 1 tensors ``[P]`` or one ``[M, P]``, of one dtype and device and any strides; P may be 0.

    Results are new and contiguous unless an argument receives them.  All sums are taken in fp64, in a fixed order.
    An argument ``out`` has unit stride and any of the four dtypes.  It does not overlap the inputs, unless the method
    says otherwise.
    """

    def weighted_mean(self, vectors: Vectors, weights: Weights, out: Tensor | None) -> Tensor:
        """``sum_m w_m x_m / sum_m w_m``, m ascending; a vector of weight zero is skipped.

        ``out`` is that of :func:`fedkern.ops.weighted_mean`: it may have any stride and overlap the vectors.  The sums
        are rounded once, to its dtype.  Weights of sum zero give NaN.
        """
        ...

    def accumulate(self, total: Tensor, vector: Tensor, weight: float) -> None:
        """``total += weight * vector`` for ``total`` fp64 ``[P]``; product and sum are each rounded."""
        ...

    def accumulated_mean(self, total: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        """``total / weight`` in the tensor ``out``, or in a new tensor of the dtype ``out``."""
        ...

    def exact_accumulate(self, digits: Tensor, top: Tensor, vector: Tensor, weight: float) -> None:
        """Adds ``weight * vector`` to the digits ``int64 [3, P]`` and their positions ``int8 [P]``; see aggregate.h."""
        ...

    def exact_mean(self, digits: Tensor, top: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        """The digits' sum divided by ``weight``, in the tensor ``out`` or in a new tensor of the dtype ``out``."""
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

        ``global_ [P]`` has the vectors' dtype and any stride.  ``first`` and ``second [P]``, fp32 or fp64 of unit
        stride, are updated in place; None where the rule has no such state.  ``out`` may be ``global_``.

        Returns:
            ``out`` or a new model of the vectors' dtype, the M norms of the deltas in fp64, and their M cosines to the
            mean delta in fp64.
        """
        ...

    def sorted_mean(self, vectors: Vectors, low: int, high: int, weights: Weights | None) -> Tensor:
        """The (weighted) mean of the values at places ``low <= k < high`` of every coordinate's ascending order.

        Equal values stay in the order of the vectors, and NaN is larger than every number.  Where the weights of these
        values sum to zero, the result is NaN.
        """
        ...

    def weighted_median(self, vectors: Vectors, weights: Weights) -> Tensor:
        """See :func:`fedkern.ops.median`: the mean of the lower and the upper weighted median."""
        ...

    def squared_distances(self, vectors: Vectors) -> Tensor:
        """fp64 ``[M, M]``: sums of squared differences (subtracted first); exactly symmetric, diagonal 0."""
        ...

    def distances(self, vectors: Vectors) -> Tensor:
        """The square roots of :meth:`squared_distances`."""
        ...

    def squared_distances_to(self, vectors: Vectors, point: Tensor) -> Tensor:
        """fp64 ``[M]``: the squared distances to ``point``, fp64 ``[P]`` of unit stride."""
        ...

    def squared_norms(self, vectors: Vectors) -> Tensor:
        """fp64 ``[M]``: the squared Euclidean norms."""
        ...

    def clip_and_noise(self, vectors: Vectors, max_norm: float, deviation: float, seed: int, offset: int) -> Tensor:
        """:meth:`scale_and_noise` with the factors ``min(1, max_norm / |x_m|)``."""
        ...

    def scale_and_noise(self, vectors: Vectors, factors: Tensor, deviation: float, seed: int, offset: int) -> Tensor:
        """``[M, P]``: ``factors[m] * x_m + deviation * normal(seed, offset + m * P + j)``; no noise at deviation 0.

        ``factors`` fp64 ``[M]`` on the vectors' device; ``seed`` and ``offset`` in [0, 2^64).  The counter-based normal
        numbers are those of :func:`fedkern.ops._aggregate.philox.normal`, to the rounding of log, sine and cosine in
        fp32.
        """
        ...
