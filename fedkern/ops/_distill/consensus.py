"""js_div, consensus: how far K distributions agree. The references are in ensemble_reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import DTYPES, eager, readable, ready, select
from fedkern.ops._core.checks import autocast
from fedkern.ops._core.function import EagerFunction, handed_out, saved_tensors
from fedkern.ops._distill.checks import check_reduction, check_stack, check_values, move_classes, spread_row_weights
from fedkern.ops._distill.ensemble_reference import consensus_reference, js_reference
from fedkern.ops._distill.entries import CONSENSUS, JS
from fedkern.ops._distill.kernels import DistillKernels, consensus_call, js_call
from fedkern.ops._distill.library import reference_gradients
from fedkern.ops._distill.rows import MAX_DIMS, NONE, REDUCTIONS


def js_div(logits: Tensor, weights: Tensor | None = None, *, reduction: str = "batchmean", dim: int = 1) -> Tensor:
    """Return ``H(Σₖ Wₖ pₖ) − Σₖ Wₖ H(pₖ)``, ``pₖ = softmax(logitsₖ)`` over the classes, axis ``dim`` of logitsₖ.

    The generalised Jensen–Shannon divergence (Lin, 1991), in nats, is at least 0 and at most log K. It is computed as
    ``Σₖ Wₖ KL(pₖ ‖ Σ W p)`` from terms that are never negative, so they do not cancel where the distributions nearly
    agree.

    Args:
        logits: ``[K, B, C]`` or ``[K, B, C, *positions]``; float32, float64, bfloat16 or float16, any strides. A class
            of logit ``-inf`` has probability 0 and contributes nothing.
        weights: ``[K]``, ``[K, B]`` or ``[K, B, *positions]``, at least 0, floating or bool; default: equal.
            Normalised over K for every row to W; 1/K where all are 0. The sum of float32 and 16-bit weights must be in
            float32's range; float64 weights may have any scale. A distribution of weight 0 has no effect,
            whatever it holds, and its weight gets no gradient.
        reduction: ``"none"`` (one value per row), ``"sum"``, or ``"batchmean"`` (the sum divided by the number of rows,
            B × positions; 0 for an empty batch).
        dim: axis of the classes in the logits of one member, as in :func:`fedkern.ops.kl_div`: the axis of the K
            members does not count. -1 for ``[K, B, T, V]``.

    Returns:
        ``[B, *positions]`` for ``"none"``, else a scalar; the logits' dtype, computed in float32 (float64 for float64).
        Under autocast 16-bit logits count as float32. Gradients go to logits and weights.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: a shape, a device or the reduction does not fit, or a weight on the CPU is negative or
            not finite.
    """
    kernel, logits, weights, code = _check("js_div", logits, weights, reduction, dim)
    if kernel is None:
        tensors = (logits,) if weights is None else (logits, weights)
        if not eager(*tensors):
            return JS(logits, weights, code)
        kernel = select("js_div", *tensors)
    if kernel is None:
        return js_reference(logits, weights, code)
    if torch.is_grad_enabled() and (logits.requires_grad or (weights is not None and weights.requires_grad)):
        return _JensenShannon.call((kernel, code), logits, weights)
    return kernel.ensemble_forward(js_call(logits, weights, code))


def consensus(
    logits: Tensor, weights: Tensor | None = None, *, reduction: str = "batchmean", dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Return entropy of the mixture and mean of the entropies, ``(H(Σₖ Wₖ pₖ), Σₖ Wₖ H(pₖ))``, from one pass.

    The difference of the two is :func:`js_div`. Where the distributions nearly agree, js_div keeps the digits that the
    difference loses. Arguments and errors are those of js_div, and each result has the shape and dtype of js_div's.
    The gradients of both results are computed in one pass.
    """
    kernel, logits, weights, code = _check("consensus", logits, weights, reduction, dim)
    if kernel is None:
        tensors = (logits,) if weights is None else (logits, weights)
        if not eager(*tensors):
            return CONSENSUS(logits, weights, code)
        kernel = select("consensus", *tensors)
    if kernel is None:
        return consensus_reference(logits, weights, code)
    if torch.is_grad_enabled() and (logits.requires_grad or (weights is not None and weights.requires_grad)):
        return _Consensus.call((kernel, code), logits, weights)
    return kernel.ensemble_forward(consensus_call(logits, weights, code))


def _check(
    operator: str, logits: Tensor, weights: Tensor | None, reduction: str, dim: int
) -> tuple[DistillKernels | None, Tensor, Tensor | None, int]:
    """Return the kernel of an ordinary call, logits with classes on axis 2, weights as rows, the reduction's number."""
    (logits,) = autocast(logits)
    if type(dim) is not int or dim != 1:
        (logits,) = move_classes(("logits",), (logits,), dim, (1,))
    kernel = ready(operator, logits) if weights is None else ready(operator, logits, weights)
    if kernel is not None and not 3 <= logits.dim() <= MAX_DIMS + 1:
        kernel = None
    if kernel is None or 0 in (logits.shape[0], logits.shape[2]):
        check_stack("logits", logits)
    code = REDUCTIONS.get(reduction) if type(reduction) is str else None
    if code is None:
        code = check_reduction(reduction)
    if weights is not None:
        check_values(weights)
        weights = spread_row_weights(weights, logits, kernel is not None)
    return kernel, logits, weights, code


class _JensenShannon(EagerFunction):
    """js_div with its gradient for eager calls, computed in the forward pass where possible, as in kl_div.

    On a GPU it would be as much to read and write again as the logits: the forward pass keeps what rows have in common.
    """

    @staticmethod
    def forward(ctx: Any, how: tuple[DistillKernels, int], logits: Tensor, weights: Tensor | None) -> Tensor:
        ctx.how = kernel, reduction = how
        call = js_call(logits, weights, reduction)
        if reduction == NONE or not kernel.fused or ctx.needs_input_grad[2]:
            statistics = None if ctx.needs_input_grad[2] else kernel.stack_statistics(logits)
            ctx.save_for_backward(logits, weights, statistics)
            return kernel.ensemble_forward(call, statistics=statistics)
        gradient = kernel.empty_gradient(logits)
        ctx.save_for_backward(logits, weights, None, gradient)
        return kernel.ensemble_forward(call, (None, gradient, None))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = saved_tensors(ctx)
        kernel, reduction = ctx.how
        needs = ctx.needs_input_grad[1:]
        if not readable(grad):
            return (None, *reference_gradients(js_reference, (grad,), saved[:2], (reduction,), needs, graph=True))
        logits, weights, statistics, *taken = saved
        if taken:
            scaled = kernel.scaled(tuple(taken), grad)
            if scaled is not None:
                return None, handed_out(scaled, taken)[0], None
        # Its None for a student's gradient is that of ``how``.
        return kernel.ensemble_backward((grad,), js_call(logits, weights, reduction), (False, *needs), statistics)


# Zero grad_outputs for a scalar result that is not used: zeros made by autograd take a microsecond each.
_ZEROS = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in DTYPES}


def _zero(grad: Tensor, plain: bool) -> Tensor:
    """Zeros for the absent grad_output beside ``grad``; ``plain``: the zeros have to be :func:`readable`."""
    return _ZEROS[grad.dtype] if plain and grad.dim() == 0 and grad.is_cpu else torch.zeros_like(grad)


class _Consensus(EagerFunction):
    """consensus with its gradient for eager calls, from the backward pass: both grad_outputs are known only there."""

    @staticmethod
    def forward(
        ctx: Any, how: tuple[DistillKernels, int], logits: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.how = kernel, reduction = how
        ctx.set_materialize_grads(False)
        statistics = None if ctx.needs_input_grad[2] else kernel.consensus_statistics(logits)
        ctx.save_for_backward(logits, weights, statistics)
        return kernel.ensemble_forward(consensus_call(logits, weights, reduction), statistics=statistics)

    @staticmethod
    def backward(ctx: Any, to_mixture: Tensor | None, to_mean: Tensor | None) -> tuple[Tensor | None, ...]:
        if to_mixture is None:
            if to_mean is None:
                return None, None, None
            plain = readable(to_mean)
            to_mixture = _zero(to_mean, plain)
        elif to_mean is None:
            plain = readable(to_mixture)
            to_mean = _zero(to_mixture, plain)
        else:
            plain = readable(to_mixture) and readable(to_mean)
        kernel, reduction = ctx.how
        needs = ctx.needs_input_grad[1:]
        logits, weights, statistics = saved_tensors(ctx)
        grads = (to_mixture, to_mean)
        if not plain:
            saved = (logits, weights)
            return (None, *reference_gradients(consensus_reference, grads, saved, (reduction,), needs, graph=True))
        return kernel.ensemble_backward(grads, consensus_call(logits, weights, reduction), (False, *needs), statistics)
