"""aggregate: coordinate-wise robust means of flat model vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedkern.ops._aggregate.checks import (
    Vectors,
    as_tensor,
    check_call,
    check_vectors,
    count_of,
    eager,
    kernel_weights,
    near_one,
    rows_of,
)
from fedkern.ops._aggregate.kernels import AggregateKernels
from fedkern.ops._aggregate.mean import fake_vector, select, weighted_mean
from fedkern.ops._core import library
from fedkern.ops._core.backend import select_ordinary
from fedkern.ops._core.checks import check_count, show_value


def trimmed_mean(vectors: Vectors, trim: int, weights: Tensor | Sequence[float] | None = None) -> Tensor:
    """Average every coordinate without its ``trim`` largest and ``trim`` smallest values (arXiv 1803.01498).

    ``sum_{k = trim}^{M - trim - 1} w_(k) x_(k) / sum_{k = trim}^{M - trim - 1} w_(k)``, where ``x_(0) <= x_(1) <= ...``
    are a coordinate's values in order and ``w_(k)`` their vectors' weights. Sums are taken in fp64. ``trim=0`` is
    :func:`weighted_mean`, bit for bit.

    NaN counts as larger than every number. So up to ``trim`` vectors full of NaN (or of infinities of one sign) are
    trimmed away like other outliers. A NaN that is left makes its coordinate NaN. Equal values are ordered as their
    vectors are.

    Args:
        vectors: M tensors ``[P]``, or one ``[M, P]``; fp32, bf16, fp16 or fp64, of one dtype and device, any strides.
        trim: number of values dropped at each end of every coordinate, ``0 <= 2 * trim < M``.
        weights: M finite numbers, at least 0 and not all 0; default: equal. A vector of weight zero is counted when
            values are trimmed; where only such vectors are left, the coordinate is NaN.

    Returns:
        ``[P]`` in the vectors' dtype. There is no gradient.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong, or a gradient was asked for.
        RuntimeError: a forced backend does not support the call.
    """
    kernel: AggregateKernels | None = None
    if weights is None and trim:
        kernel = select_ordinary("aggregate", vectors, torch.is_grad_enabled())
    if kernel is not None:
        count = count_of(vectors)
        _check_trim(trim, count)
        return kernel.sorted_mean(vectors, trim, count - trim, None)
    template, count = check_vectors(vectors)
    _check_trim(trim, count)
    check_call("trimmed_mean", vectors, weights, template, count)
    if trim == 0:
        return weighted_mean(vectors, [1.0] * count if weights is None else weights)
    return _sorted_mean(vectors, trim, count - trim, weights, template, count)


def median(vectors: Vectors, weights: Tensor | Sequence[float] | None = None) -> Tensor:
    """Take the median of every coordinate (arXiv 1803.01498): the mean of the two middle values for even M.

    With weights, it is the mean of the lower and the upper weighted median. The lower one is the smallest value such
    that this value and the values below have at least half of the weight; for the upper one they have more than half.
    The two differ only where a set of the smallest values has exactly half of the weight, within a relative 2^-40, so
    that rounding does not decide. With equal weights this is the median.

    NaN counts as larger than every number, so a minority of vectors may be full of NaN. A coordinate is NaN where a
    NaN is in the middle.

    Args:
        vectors: M tensors ``[P]``, or one ``[M, P]``; fp32, bf16, fp16 or fp64, of one dtype and device, any strides.
        weights: M finite numbers, at least 0 and not all 0; default: equal. A vector of weight zero has no influence.

    Returns:
        ``[P]`` in the vectors' dtype. There is no gradient.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong, or a gradient was asked for.
        RuntimeError: a forced backend does not support the call.
    """
    kernel: AggregateKernels | None = None
    if weights is None:
        kernel = select_ordinary("aggregate", vectors, torch.is_grad_enabled())
    if kernel is not None:
        count = count_of(vectors)
        return kernel.sorted_mean(vectors, (count - 1) // 2, count // 2 + 1, None)
    template, count = check_vectors(vectors)
    check_call("median", vectors, weights, template, count)
    if weights is None:
        return _sorted_mean(vectors, (count - 1) // 2, count // 2 + 1, None, template, count)
    if not eager(vectors, weights):
        return _weighted_median_operator(rows_of(vectors), as_tensor(weights, template, count))
    return _weighted_median_implementation(vectors, weights)


def _check_trim(trim: int, count: int) -> None:
    check_count(trim, "trim", 0)
    if 2 * trim >= count:
        raise ValueError(f"trim must be less than half of the number of vectors, {count}, not {show_value(trim)}")


def _sorted_mean(
    vectors: Vectors, low: int, high: int, weights: Tensor | Sequence[float] | None, template: Tensor, count: int
) -> Tensor:
    if not eager(vectors, weights):
        weight_tensor = None if weights is None else as_tensor(weights, template, count)
        return _sorted_mean_operator(rows_of(vectors), low, high, weight_tensor)
    return _sorted_mean_implementation(vectors, low, high, weights)


def _sorted_mean_implementation(
    vectors: Vectors, low: int, high: int, weights: Tensor | Sequence[float] | None
) -> Tensor:
    values = None if weights is None else kernel_weights(weights, len(vectors))
    return select(vectors).sorted_mean(vectors, low, high, values)


def _weighted_median_implementation(vectors: Vectors, weights: Tensor | Sequence[float]) -> Tensor:
    return select(vectors).weighted_median(vectors, near_one(kernel_weights(weights, len(vectors))))


_sorted_mean_operator = library.register(
    "sorted_mean",
    "(Tensor[] vectors, SymInt low, SymInt high, Tensor? weights) -> Tensor",
    _sorted_mean_implementation,
    fake=fake_vector,
    public="trimmed_mean and median",
)
_weighted_median_operator = library.register(
    "weighted_median",
    "(Tensor[] vectors, Tensor weights) -> Tensor",
    _weighted_median_implementation,
    fake=fake_vector,
    public="median",
)
