"""js_div, consensus: how far K distributions agree."""

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import eager, select, select_ordinary
from fedkern.ops._core.checks import autocast
from fedkern.ops._distill.checks import check_reduction, check_stack, check_values, move_classes, spread_row_weights
from fedkern.ops._distill.ensemble_reference import consensus_reference, js_reference
from fedkern.ops._distill.entries import CONSENSUS, JS
from fedkern.ops._distill.gradients import EnsembleFunction
from fedkern.ops._distill.kernels import DistillKernels, Ensemble, consensus_call, js_call
from fedkern.ops._distill.rows import MAX_DIMS


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
    divergence: Tensor = _compute(kernel, js_call(logits, weights, code))
    return divergence


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
    entropies: tuple[Tensor, Tensor] = _compute(kernel, consensus_call(logits, weights, code))
    return entropies


def _check(
    operator: str, logits: Tensor, weights: Tensor | None, reduction: str, dim: int
) -> tuple[DistillKernels | None, Tensor, Tensor | None, int]:
    (logits,) = autocast(logits)
    if type(dim) is not int or dim != 1:
        (logits,) = move_classes(("logits",), (logits,), dim, (1,))
    kernel = select_ordinary(operator, logits) if weights is None else select_ordinary(operator, logits, weights)
    if kernel is not None and not 3 <= logits.dim() <= MAX_DIMS + 1:
        kernel = None
    if kernel is None or 0 in (logits.shape[0], logits.shape[2]):
        check_stack("logits", logits)
    code = check_reduction(reduction)
    if weights is not None:
        ordinary = kernel is not None
        check_values(weights, ordinary)
        weights = spread_row_weights(weights, logits, ordinary)
    return kernel, logits, weights, code


def _compute(kernel: DistillKernels, call: Ensemble) -> Any:
    logits, weights = call.teachers, call.weights
    if torch.is_grad_enabled() and (logits.requires_grad or (weights is not None and weights.requires_grad)):
        return EnsembleFunction.call((kernel, call), *call[:4])
    return kernel.ensemble_forward(call)
