"""aggregate: weighted means of flat model vectors."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._aggregate import checks
from fedkern.ops._aggregate.checks import Vectors
from fedkern.ops._aggregate.kernels import AggregateKernels
from fedkern.ops._aggregate.plain import PLAIN, PlainAggregate
from fedkern.ops._aggregate.reference import countable, weighted_mean_reference
from fedkern.ops._core import backend, library
from fedkern.ops._core.backend import select_ordinary
from fedkern.ops._core.library import Context, EagerFunction, saved_tensors
from fedkern.ops._core.memory import place_values


def weighted_mean(
    vectors: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float], out: Tensor | None = None
) -> Tensor:
    """Average the clients' flat vectors: ``sum_m weights[m] * vectors[m] / sum(weights)`` (FedAvg, arXiv 1602.05629).

    Sums are taken in fp64 whatever the dtype, in the order given. The mean of equal fp32, bf16 or fp16 vectors is that
    vector exactly, and the bits do not depend on the number of threads. An :class:`Accumulator` that gets the same
    vectors in the same order gives the same bits.

    Differentiable in the vectors and in a tensor of weights. Works under torch.func.grad, vmap and torch.compile (one
    graph node, on a stacked ``[M, P]``).

    Args:
        vectors: M tensors ``[P]``, or one ``[M, P]``; fp32, bf16, fp16 or fp64, of one dtype and device, any strides.
        weights: M finite numbers, at least 0 and not all 0: a sequence, or a tensor ``[M]`` on the CPU or the vectors'
            device. They need not sum to one. A vector of weight zero is ignored and may hold NaN; then only the
            gradient of its own weight is NaN.
        out: tensor ``[P]`` that receives the result, in any of these dtypes and any stride; sums are rounded to its
            dtype. It may be one of the vectors. Not allowed where a gradient is recorded.

    Returns:
        ``[P]`` in the vectors' dtype, or ``out``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device or shape is wrong, or (for weights on the CPU) a weight
            is negative or not finite, or the sum of the weights is zero. On CUDA weights of sum zero give NaN.
        RuntimeError: a forced backend does not support the call.
    """
    if not isinstance(weights, Tensor):
        recorded = torch.is_grad_enabled()
        kernel: AggregateKernels | None = select_ordinary("aggregate", vectors, recorded, out)
        if kernel is not None:
            return kernel.weighted_mean(vectors, kernel.numbers(weights, checks.count_of(vectors)), out)
        if recorded and out is None:
            kernel = select_ordinary("aggregate", vectors, False)
            if kernel is not None:
                checked = checks.check_weights(weights, checks.count_of(vectors))
                return _WeightedMean.call(kernel, isinstance(vectors, Tensor), checked, *checks.rows_or_stack(vectors))
    template, count = checks.check_vectors(vectors)
    if isinstance(weights, Tensor):
        checks.check_weights_tensor(weights, count, template.device)
    if out is not None:
        checks.check_out(out, template.shape[-1], template.device)
    rows: Sequence[Tensor] = (vectors,) if isinstance(vectors, Tensor) else vectors
    tensors = [*rows, weights] if isinstance(weights, Tensor) else [*rows]
    if not backend.eager(*tensors, *(() if out is None else (out,))):
        stacked = vectors if isinstance(vectors, Tensor) else torch.stack(list(vectors))
        weights = checks.as_tensor(weights, template, count)
        result = _weighted_mean(stacked, weights, None if out is None else out.dtype)
        return result if out is None else out.copy_(result)
    if torch.is_grad_enabled():
        differentiable = any(tensor.requires_grad for tensor in tensors)
        if out is not None and (differentiable or out.requires_grad):
            raise ValueError(
                "out takes no part in differentiation; call weighted_mean under torch.no_grad(), or without out"
            )
        if differentiable:
            values = weights if isinstance(weights, Tensor) else checks.check_weights(weights, count)
            return _WeightedMean.call(select(vectors), isinstance(vectors, Tensor), values, *rows)
    return _compute(vectors, weights, out)


def _compute(vectors: Vectors, weights: Tensor | Sequence[float], out: Tensor | None) -> Tensor:
    return select(vectors).weighted_mean(vectors, checks.kernel_weights(weights, len(vectors)), out)


def select(vectors: Vectors, *others: Tensor) -> PlainAggregate:
    """Return the backend's kernel object, or the plain reference."""
    return backend.select("aggregate", *checks.rows_or_stack(vectors), *others) or PLAIN


def fake_vector(vectors: list[Tensor], *others: Any) -> Tensor:
    return vectors[0].new_empty(vectors[0].shape)


class _WeightedMean(EagerFunction):
    @staticmethod
    def forward(
        ctx: Context, kernel: PlainAggregate, stacked: bool, weights: Tensor | tuple[list[float], float], *rows: Tensor
    ) -> Tensor:
        vectors: Vectors = rows[0] if stacked else rows
        if isinstance(weights, tuple):
            ctx.settings = stacked, weights
            return kernel.weighted_mean(vectors, weights[0], None)
        ctx.settings = stacked, None
        ctx.save_for_backward(weights, *(rows if ctx.needs_input_grad[2] else ()))
        return kernel.weighted_mean(vectors, checks.kernel_weights(weights, checks.count_of(vectors)), None)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        stacked, numbers = ctx.settings
        by_weights: Tensor | None = None
        shares: Tensor | list[float]
        if numbers is None:
            weights, *rows = saved_tensors(ctx)
            shares = _shares(weights, grad)
            if ctx.needs_input_grad[2]:
                by_weights = _by_weights(grad, rows[0] if stacked else torch.stack(rows), weights)
        else:
            values, total = numbers
            shares = [value / total for value in values]
        needs = ctx.needs_input_grad[3:]
        if stacked:
            return None, None, by_weights, _outer(shares, grad) if needs[0] else None
        parts = [grad * share if need else None for share, need in zip(shares, needs, strict=True)]
        return None, None, by_weights, *parts


def _shares(weights: Tensor, grad: Tensor) -> Tensor:
    values = weights.to(grad.device, torch.float64)
    return values / values.sum()


def _outer(shares: Tensor | list[float], grad: Tensor) -> Tensor:
    dtype = grad.dtype if grad.dtype.itemsize > 2 else torch.float32
    shares = shares.to(dtype) if isinstance(shares, Tensor) else place_values(shares, grad.device, dtype)
    outer = torch.outer(shares, grad)
    return outer if outer.dtype is grad.dtype else outer.to(grad.dtype)


def _by_weights(grad: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Compute <grad, row - mean> / sum(weights), NaN for a non-finite vector of weight 0."""
    values = weights.to(rows.device, torch.float64)
    counted = countable(rows, values)
    wide = torch.where(counted[:, None], rows.to(torch.float64), 0.0)
    scaled = checks.near_one(values)
    mean = (scaled @ wide) / scaled.sum()
    gradient = (wide - mean) @ grad.to(torch.float64) / values.sum()
    return torch.where(counted, gradient, math.nan).to(weights.device, weights.dtype)


def _implementation(vectors: Tensor, weights: Tensor, dtype: torch.dtype | None) -> Tensor:
    return _compute(vectors, weights, None if dtype is None else _fake(vectors, weights, dtype))


def _fake(vectors: Tensor, weights: Tensor, dtype: torch.dtype | None) -> Tensor:
    return vectors.new_empty(vectors.shape[1], dtype=dtype)


def _setup_context(ctx: Context, inputs: tuple[Tensor, Tensor, torch.dtype | None], output: Tensor) -> None:
    vectors, weights, _ = inputs
    ctx.settings = vectors.dtype
    ctx.save_for_backward(vectors if ctx.needs_input_grad[1] else None, weights)


def _backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    vectors, weights = ctx.saved_tensors
    by_vectors = _outer(_shares(weights, grad), grad).to(ctx.settings) if ctx.needs_input_grad[0] else None
    return by_vectors, _by_weights(grad, vectors, weights) if ctx.needs_input_grad[1] else None, None


def _vmap(
    info: library.Mapped,
    in_dims: tuple[int | None, int | None, None],
    vectors: Tensor,
    weights: Tensor,
    dtype: torch.dtype | None,
) -> tuple[Tensor, int]:
    rows, values, _ = in_dims
    if values is None:
        assert rows is not None
        stacked = vectors.movedim(rows, 1)
        return _weighted_mean(stacked.flatten(1, 2), weights, dtype).unflatten(0, stacked.shape[1:]), 0
    # Every mapped entry has its own weights: one call each.
    rows_of_weights = weights.movedim(values, 0).unbind()
    parts = [vectors] * len(rows_of_weights) if rows is None else vectors.movedim(rows, 0).unbind()
    return torch.stack([_weighted_mean(part, row, dtype) for part, row in zip(parts, rows_of_weights, strict=True)]), 0


_weighted_mean = library.register(
    "weighted_mean", "(Tensor vectors, Tensor weights, ScalarType? dtype) -> Tensor", _implementation, fake=_fake,
    setup_context=_setup_context, backward=_backward, vmap=_vmap, reference=weighted_mean_reference,
)  # fmt: skip


backend.add_kernels("aggregate", cpu=AggregateKernels, cuda=AggregateKernels, fits="vectors_fit")
