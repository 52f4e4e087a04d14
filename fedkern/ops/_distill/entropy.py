"""entropy: Shannon entropy of the softmax of logits. The reference is in reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core import library
from fedkern.ops._core.backend import eager, readable, ready, select
from fedkern.ops._core.checks import autocast
from fedkern.ops._core.function import EagerFunction, handed_out, saved_tensors
from fedkern.ops._distill.checks import check_logits, check_reduction, move_classes
from fedkern.ops._distill.entries import ENTROPY
from fedkern.ops._distill.kernels import DistillKernels, entropy_call
from fedkern.ops._distill.reference import entropy_rows_reference
from fedkern.ops._distill.rows import NONE, REDUCTIONS


def entropy(logits: Tensor, *, reduction: str = "batchmean", dim: int = 1) -> Tensor:
    """Return the entropy ``H(softmax(logits)) = −Σ p log p`` over the classes, which lie on axis ``dim``, in nats.

    Args:
        logits: ``[B, C]`` or ``[B, C, *positions]``; float32, float64, bfloat16 or float16, any strides. A class of
            logit ``-inf`` has probability 0 and contributes nothing.
        reduction: ``"none"`` (one value per row), ``"sum"``, or ``"batchmean"`` (the sum divided by the number of rows,
            B × positions; 0 for an empty batch).
        dim: axis of the classes, as in :func:`fedkern.ops.kl_div`: -1 for ``[B, T, V]``.

    Returns:
        ``[B, *positions]`` for ``"none"``, else a scalar; the logits' dtype, computed in float32 (float64 for float64).
        Under autocast 16-bit logits count as float32.

    Raises:
        TypeError: ``logits`` is not a tensor or has another dtype.
        ValueError: the shape of ``logits`` or the reduction is wrong.
    """
    (logits,) = autocast(logits)
    if type(dim) is not int or dim != 1:
        (logits,) = move_classes(("logits",), (logits,), dim, (0,))
    kernel = ready("entropy", logits)
    if kernel is None:
        check_logits(("logits",), (logits,))
    code = REDUCTIONS.get(reduction) if type(reduction) is str else None
    if code is None:
        code = check_reduction(reduction)
    if kernel is None:
        if not eager(logits):
            return ENTROPY(logits, code)
        kernel = select("entropy", logits)
    if kernel is None:
        return entropy_rows_reference(logits, code)
    if logits.requires_grad and torch.is_grad_enabled():
        return _Entropy.call(logits, code, kernel)
    return kernel.divergence_forward(entropy_call(logits, code))


class _Entropy(EagerFunction):
    """entropy with its gradient for eager calls, computed in the forward pass where possible, as in kl_div."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reduction: int, kernel: DistillKernels) -> Tensor:
        ctx.reduction, ctx.kernel = reduction, kernel
        call = entropy_call(logits, reduction)
        gradient = None if reduction == NONE or not kernel.fused else kernel.empty_gradient(logits)
        statistics = kernel.divergence_statistics(call) if gradient is None else None
        ctx.save_for_backward(logits, gradient, statistics)
        return kernel.divergence_forward(call, (None, None, gradient), statistics=statistics)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        logits, gradient, statistics = saved_tensors(ctx)
        if not readable(grad):
            (result,) = library.differentiate_reference(
                lambda x: entropy_rows_reference(x, ctx.reduction), (logits,), (True,), grad
            )
            return result, None, None
        if gradient is not None:
            scaled = ctx.kernel.scaled((gradient,), grad)
            if scaled is not None:
                return handed_out(scaled, (gradient,))[0], None, None
        call = entropy_call(logits, ctx.reduction)
        return ctx.kernel.divergence_backward((grad,), call, (False, False, True, False), statistics)[2], None, None
