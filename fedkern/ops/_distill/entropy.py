"""entropy: Shannon entropy of the softmax of logits. The reference is in reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core import library
from fedkern.ops._core.backend import eager, readable, ready, select
from fedkern.ops._core.function import EagerFunction, handed_out
from fedkern.ops._distill.common import (
    NONE,
    REDUCTIONS,
    check_logits,
    check_reduction,
    reduce_mapped,
    row_shape,
    spread_mapped,
    unmapped,
)
from fedkern.ops._distill.kernels import DistillKernel
from fedkern.ops._distill.reference import entropy_rows_reference

# the public function: checks and choice of path


def entropy(logits: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """Entropy ``H(softmax(logits)) = −Σ p log p`` over classes, in nats.

    Args:
        logits: ``[B, C]`` or ``[B, C, *positions]``; float32, float64, bfloat16 or float16, any strides. A class of
            logit ``-inf`` has probability 0 and contributes nothing.
        reduction: ``"none"`` (one value per row), ``"sum"``, or ``"batchmean"`` (the sum divided by the number of rows,
            B × positions; 0 for an empty batch).

    Returns:
        ``[B, *positions]`` for ``"none"``, else a scalar; the logits' dtype, computed in float32 (float64 for float64).

    Raises:
        TypeError: ``logits`` is not a tensor or has another dtype.
        ValueError: the shape of ``logits`` or the reduction is wrong.
    """
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
    return kernel.entropy_forward(logits, code)


# forward and backward, each one call into the kernel


class _Entropy(EagerFunction):
    """entropy with its gradient for eager calls, computed in the forward pass where possible, as in kl_div."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reduction: int, kernel: DistillKernel) -> Tensor:
        ctx.reduction, ctx.kernel = reduction, kernel
        gradient = None if reduction == NONE or not kernel.fused else kernel.empty_gradient(logits)
        ctx.save_for_backward(logits, gradient)
        return kernel.entropy_forward(logits, reduction, gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        logits, gradient = ctx.saved_tensors
        if not readable(grad):
            (result,) = library.differentiate_reference(
                lambda x: entropy_rows_reference(x, ctx.reduction), (logits,), (True,), grad
            )
            return result, None, None
        if gradient is not None:
            scaled = ctx.kernel.scaled((gradient,), grad)
            if scaled is not None:
                return handed_out(scaled, (gradient,))[0], None, None
        return ctx.kernel.entropy_backward(grad, logits, ctx.reduction), None, None


# the same operator for torch.compile, torch.func, vmap and opcheck


def _run(logits: Tensor, reduction: int) -> Tensor:
    kernel = select("entropy", logits)
    return entropy_rows_reference(logits, reduction) if kernel is None else kernel.entropy_forward(logits, reduction)


def _fake(logits: Tensor, reduction: int) -> Tensor:
    return torch.empty(row_shape(logits) if reduction == NONE else (), dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.reduction = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return ENTROPY_BACKWARD(grad, ctx.saved_tensors[0], ctx.reduction), None


def _vmap(info: Any, in_dims: tuple[int | None, None], logits: Tensor, reduction: int) -> tuple[Tensor, int]:
    logits = unmapped(logits, in_dims[0], info.batch_size)
    rows = ENTROPY(logits.flatten(0, 1), NONE).unflatten(0, logits.shape[:2])
    return reduce_mapped(rows, reduction), 0


def _run_backward(grad: Tensor, logits: Tensor, reduction: int) -> Tensor:
    kernel = select("entropy", logits)
    if kernel is not None:
        return kernel.entropy_backward(grad, logits, reduction)
    (result,) = library.differentiate_reference(
        lambda x: entropy_rows_reference(x, reduction), (logits.detach().requires_grad_(),), (True,), grad
    )
    assert result is not None
    return torch.empty_like(logits).copy_(result.detach())


def _fake_backward(grad: Tensor, logits: Tensor, reduction: int) -> Tensor:
    return torch.empty_like(logits)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.reduction = inputs[2]


def _second(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    def gradient(outer: Tensor, logits: Tensor) -> Tensor:
        pull = torch.func.vjp(lambda x: entropy_rows_reference(x, ctx.reduction), logits)[1]
        return pull(outer)[0]

    pull = torch.func.vjp(gradient, *ctx.saved_tensors)[1]
    return (*pull(grad), None)


def _vmap_backward(
    info: Any, in_dims: tuple[int | None, int | None, None], grad: Tensor, logits: Tensor, reduction: int
) -> tuple[Tensor, int]:
    count = info.batch_size
    logits = unmapped(logits, in_dims[1], count)
    g = spread_mapped(grad, in_dims[0], count, row_shape(logits[0]), reduction)
    return ENTROPY_BACKWARD(g, logits.flatten(0, 1), NONE).unflatten(0, logits.shape[:2]), 0


ENTROPY = library.register(
    "entropy",
    "(Tensor logits, int reduction) -> Tensor",
    _run,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    reference=entropy_rows_reference,
)
ENTROPY_BACKWARD = library.register(
    "entropy_backward",
    "(Tensor grad, Tensor logits, int reduction) -> Tensor",
    _run_backward,
    fake=_fake_backward,
    setup_context=_setup_second,
    backward=_second,
    vmap=_vmap_backward,
)
