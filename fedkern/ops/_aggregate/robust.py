"""aggregate: coordinate-wise robust means of flat model vectors, clipping to a norm, and Gaussian noise."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._aggregate import checks
from fedkern.ops._aggregate.checks import Vectors
from fedkern.ops._aggregate.kernels import SHORT, AggregateKernels
from fedkern.ops._aggregate.mean import fake_vector, select, weighted_mean
from fedkern.ops._aggregate.plain import PlainAggregate
from fedkern.ops._aggregate.reference import to_signed
from fedkern.ops._core import backend, library
from fedkern.ops._core.backend import select_ordinary
from fedkern.ops._core.checks import check_count, check_dense, check_number, refuse_gradient, show_value


def clip_by_norm(vectors: Vectors, max_norm: float) -> Any:
    """Scale every vector down to a Euclidean norm of at most ``max_norm``: ``x * min(1, max_norm / |x|)``.

    Norms are taken in fp64 over a whole vector. The bound holds up to rounding: a norm may exceed it by about
    ``torch.finfo(dtype).eps``, and by more where results or the factor are below the normal range (of the dtype, of
    fp64). A vector of a smaller norm comes back unchanged, the zero vector too.
    Scaled bf16 and fp16 vectors are made shorter by another half of ``torch.finfo(dtype).eps``, so that rounding to
    normal numbers does not lift their norm above the bound. A vector that holds NaN becomes NaN everywhere. A vector
    that holds an infinity becomes 0, with NaN where the infinity was: clip the difference of two models, not a model
    that holds a mask of -inf.

    Args:
        vectors: one ``[P]``, one ``[M, P]`` (clipped row by row), or M tensors ``[P]``; fp32, bf16, fp16 or fp64, of
            one dtype and device, any strides.
        max_norm: largest norm of a result, greater than 0.

    Returns:
        New vectors in the form of the input; a list gets separate memory for each vector. There is no gradient.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong, or a gradient was asked for.
        RuntimeError: a forced backend does not support the call.
    """
    return _call("clip_by_norm", vectors, check_number(max_norm, "max_norm", above=True), 0.0, 0, 0)


def clip_and_noise(vectors: Vectors, max_norm: float, noise: float, seed: int, offset: int = 0) -> Any:
    """Clip every vector and add Gaussian noise: ``x * min(1, max_norm / |x|) + N(0, (noise * max_norm)^2)``.

    The sum is rounded once. Without noise this is :func:`clip_by_norm`.

    This is one release of the Gaussian mechanism (Dwork and Roth, 2014, appendix A; DP-SGD, arXiv 1607.00133) where one
    record changes one vector. Privacy accounting is left to the caller.

    The noise comes from a counter-based generator (:func:`fedkern.ops._aggregate.reference.normal`): element j of
    vector m takes place ``offset + m * P + j`` of the stream of ``seed``. So the noise does not depend on how vectors
    are grouped into calls, on their dtype or on the number of threads. The CPU kernels make the same noise, bit for
    bit, on every ISA level; other backends agree to the rounding of log, sine and cosine in fp32. The factor of a
    clipped vector comes from a sum in fp64 whose last bit differs between ISA levels, and so may the last bit of the
    result. Never use a place twice: the next call's offset is ``offset + M * P``.

    The noise has fp32 resolution whatever the dtype, and its tail follows the normal distribution to 9.5 standard
    deviations. Floating-point noise does not protect against attacks on the lowest bits of the result (Mironov, CCS
    2012).

    Philox4x32-10, which makes the numbers, is not a cryptographic generator, and its key ``seed`` has 64 bits: give
    every release its own secret seed. Noise makes running variances of batch norms negative: add it to
    ``FlatParameters.parameters``, or set the variances of a noised ``FlatParameters.vector`` to at least 0.

    Args:
        vectors, max_norm: as for :func:`clip_by_norm`.
        noise: noise multiplier: standard deviation of the noise in multiples of ``max_norm``, at least 0. The
            vectors' dtype must hold 9.5 standard deviations.
        seed: seed of the stream, from 0 to 2^64 - 1.
        offset: place of the first element in the stream, from 0 to 2^64 - 1.

    Returns:
        New vectors in the form of the input; a list gets separate memory for each vector. There is no gradient.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong, or a gradient was asked for.
        RuntimeError: a forced backend does not support the call.
    """
    bound = check_number(max_norm, "max_norm", above=True)
    deviation = check_number(noise, "noise") * bound
    seed, offset = (check_count(value, name, 0, 2**64 - 1) for value, name in ((seed, "seed"), (offset, "offset")))
    return _call("clip_and_noise", vectors, bound, deviation, seed, offset)


def _call(name: str, vectors: Vectors, max_norm: float, deviation: float, seed: int, offset: int) -> Any:
    if isinstance(vectors, Tensor) and vectors.is_nested:
        check_dense(vectors, "vectors")
    single = isinstance(vectors, Tensor) and vectors.dim() == 1
    if isinstance(vectors, Tensor) and vectors.dim() not in (1, 2) and vectors.dtype in backend.FLOATS:
        raise ValueError(f"vectors must have shape [P] or [M, P], or be a list of [P], but has {list(vectors.shape)}")
    stack: Vectors = (vectors,) if single else vectors  # type: ignore[assignment]
    kernel = _select(stack)
    if kernel is not None:
        _check_deviation(deviation, stack[0].dtype)
        return _rows(kernel, vectors, stack, max_norm, deviation, seed, offset)
    stack = vectors[None] if single else vectors  # type: ignore[call-overload]
    if isinstance(stack, Tensor) and not stack.shape[0] and stack.dtype in backend.FLOATS:
        return stack.clone()
    checks.check_vectors(stack)
    refuse_gradient(name, *checks.rows_or_stack(stack))
    _check_deviation(deviation, stack[0].dtype)
    if checks.eager(stack):
        return _rows(select(stack), vectors, stack, max_norm, deviation, seed, offset)
    numbers = library.numbers_tensor((max_norm, deviation))
    result = _operator(checks.rows_of(stack), numbers, to_signed(seed), to_signed(offset))
    return result[0] if single else result if isinstance(vectors, Tensor) else [row.clone() for row in result.unbind(0)]


def _check_deviation(deviation: float, dtype: torch.dtype) -> None:
    """Raise ValueError if the largest noise, of 9.5 standard deviations, is infinite in ``dtype``."""
    if 9.5 * deviation > torch.finfo(dtype).max:
        limit = torch.finfo(dtype).max / 9.5
        raise ValueError(f"noise times max_norm must be at most {limit:g} for vectors of {dtype}, not {deviation:g}")


def _rows(
    kernel: PlainAggregate, vectors: Vectors, stack: Vectors, max_norm: float, deviation: float, seed: int, offset: int
) -> Any:
    """Return the results in the form of ``vectors``, with separate memory for a list."""
    if isinstance(vectors, Tensor):
        result = kernel.clip_and_noise(stack, max_norm, deviation, seed, offset)
        return result[0] if vectors.dim() == 1 else result
    if not kernel.host:
        return kernel.scale_each(vectors, kernel.clip_factors(vectors, max_norm, deviation), deviation, seed, offset)
    size = checks.size_of(vectors)
    if size <= SHORT:
        return [row.clone() for row in kernel.clip_and_noise(vectors, max_norm, deviation, seed, offset).unbind(0)]
    # A vector may still be cached from its norm.
    return [
        kernel.clip_and_noise([vector], max_norm, deviation, seed, (offset + m * size) % (1 << 64))[0]
        for m, vector in enumerate(vectors)
    ]


def _implementation(vectors: list[Tensor], numbers: Tensor, seed: int, offset: int) -> Tensor:
    max_norm, deviation = numbers.tolist()
    return select(vectors).clip_and_noise(vectors, max_norm, deviation, seed % (1 << 64), offset % (1 << 64))


_operator = library.register(
    "clip_and_noise",
    "(Tensor[] vectors, Tensor numbers, SymInt seed, SymInt offset) -> Tensor",
    _implementation,
    fake=lambda vectors, *_: vectors[0].new_empty((len(vectors), vectors[0].shape[0])),
    public="clip_by_norm and clip_and_noise",
)


def _select(vectors: Vectors) -> AggregateKernels | None:
    kernel: AggregateKernels | None = select_ordinary("aggregate", vectors, torch.is_grad_enabled())
    return kernel


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
    if weights is None and trim and (kernel := _select(vectors)) is not None:
        count = checks.count_of(vectors)
        _check_trim(trim, count)
        return kernel.sorted_mean(vectors, trim, count - trim, None)
    template, count = checks.check_vectors(vectors)
    _check_trim(trim, count)
    checks.check_call("trimmed_mean", vectors, weights, template, count)
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
    if weights is None and (kernel := _select(vectors)) is not None:
        count = checks.count_of(vectors)
        return kernel.sorted_mean(vectors, (count - 1) // 2, count // 2 + 1, None)
    template, count = checks.check_vectors(vectors)
    checks.check_call("median", vectors, weights, template, count)
    if weights is None:
        return _sorted_mean(vectors, (count - 1) // 2, count // 2 + 1, None, template, count)
    if not checks.eager(vectors, weights):
        return _weighted_median_operator(checks.rows_of(vectors), checks.as_tensor(weights, template, count))
    return _weighted_median_implementation(vectors, weights)


def _check_trim(trim: int, count: int) -> None:
    check_count(trim, "trim", 0)
    if 2 * trim >= count:
        raise ValueError(f"trim must be less than half of the number of vectors, {count}, not {show_value(trim)}")


def _sorted_mean(
    vectors: Vectors, low: int, high: int, weights: Tensor | Sequence[float] | None, template: Tensor, count: int
) -> Tensor:
    if not checks.eager(vectors, weights):
        weight_tensor = None if weights is None else checks.as_tensor(weights, template, count)
        return _sorted_mean_operator(checks.rows_of(vectors), low, high, weight_tensor)
    return _sorted_mean_implementation(vectors, low, high, weights)


def _sorted_mean_implementation(
    vectors: Vectors, low: int, high: int, weights: Tensor | Sequence[float] | None
) -> Tensor:
    values = None if weights is None else checks.kernel_weights(weights, len(vectors))
    return select(vectors).sorted_mean(vectors, low, high, values)


def _weighted_median_implementation(vectors: Vectors, weights: Tensor | Sequence[float]) -> Tensor:
    return select(vectors).weighted_median(vectors, checks.near_one(checks.kernel_weights(weights, len(vectors))))


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
