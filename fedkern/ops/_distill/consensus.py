"""js_div, consensus: how far K distributions agree."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import eager, select, select_ordinary
from fedkern.ops._core.checks import autocast
from fedkern.ops._core.library import Result
from fedkern.ops._distill.checks import check_reduction, check_stack, check_values, move_classes, spread_row_weights
from fedkern.ops._distill.ensemble_reference import consensus_reference, js_reference
from fedkern.ops._distill.entries import CONSENSUS, JS
from fedkern.ops._distill.gradients import EnsembleFunction
from fedkern.ops._distill.kernels import DistillKernels, Ensemble, consensus_call, js_call
from fedkern.ops._distill.rows import MAX_DIMS

Functions = tuple[Callable[..., Result], Callable[..., Result], Callable[..., Ensemble]]
"""An operator of torch.library, its reference, and the function that makes the kernels' call."""


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
    return _dispatch("js_div", (JS, js_reference, js_call), logits, weights, reduction, dim)


def consensus(
    logits: Tensor, weights: Tensor | None = None, *, reduction: str = "batchmean", dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Return entropy of the mixture and mean of the entropies, ``(H(Σₖ Wₖ pₖ), Σₖ Wₖ H(pₖ))``, from one pass.

    The difference of the two is :func:`js_div`. Where the distributions nearly agree, js_div keeps the digits that the
    difference loses. Arguments and errors are those of js_div, and each result has the shape and dtype of js_div's.
    The gradients of both results are computed in one pass.
    """
    return _dispatch("consensus", (CONSENSUS, consensus_reference, consensus_call), logits, weights, reduction, dim)


def _dispatch(
    operator: str, functions: Functions[Result], logits: Tensor, weights: Tensor | None, reduction: str, dim: int
) -> Result:
    registered, reference, call = functions
    (logits,) = autocast(logits)
    if type(dim) is not int or dim != 1:
        (logits,) = move_classes(("logits",), (logits,), dim, (1,))
    tensors = (logits,) if weights is None else (logits, weights)
    kernel: DistillKernels | None = select_ordinary(operator, *tensors)
    if kernel is not None and not 3 <= logits.dim() <= MAX_DIMS + 1:
        kernel = None
    if kernel is None or 0 in (logits.shape[0], logits.shape[2]):
        check_stack("logits", logits)
    code = check_reduction(reduction)
    if weights is not None:
        check_values(weights, kernel is not None)
        weights = spread_row_weights(weights, logits, kernel is not None)
    if kernel is None:
        tensors = (logits,) if weights is None else (logits, weights)
        if not eager(*tensors):
            return registered(logits, weights, code)
        kernel = select(operator, *tensors)
    if kernel is None:
        return reference(logits, weights, code)
    result: Result = _compute(kernel, call(logits, weights, code))
    return result


def _compute(kernel: DistillKernels, call: Ensemble) -> Any:
    logits, weights = call.teachers, call.weights
    if torch.is_grad_enabled() and (logits.requires_grad or (weights is not None and weights.requires_grad)):
        return EnsembleFunction.call((kernel, call), *call[:4])
    return kernel.ensemble_forward(call)
