"""blend: plain PyTorch references of the operator, its gradients and its second derivatives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedkern.ops._blend.kernels import BlendCall, Gradients
from fedkern.ops._core.library import Context


def blend_reference(
    foreground: Tensor, background: Tensor, alpha: float | Tensor = 0.5, index: Tensor | None = None
) -> Tensor:
    """Specify :func:`blend`."""
    front, back = widen(foreground), widen(background)
    back = back if index is None else back[index]
    if isinstance(alpha, Tensor):
        alpha = per_sample(alpha.to(front.dtype), front)
    return (alpha * front + (1 - alpha) * back).to(torch.promote_types(foreground.dtype, background.dtype))


def widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_values(call: BlendCall) -> None:
    """Raise ValueError for CPU values out of range, as the CPU kernel does."""
    alpha, _, index, background_rows = call
    if index is not None and index.device.type == "cpu":
        for position in ((index < 0) | (index >= background_rows)).nonzero().flatten().tolist():
            raise ValueError(
                f"index must be in [0, {background_rows}), the rows of background; "
                f"index[{position}] is {int(index[position])}"
            )
    if alpha is not None and alpha.device.type == "cpu":
        for position in (~((alpha >= 0) & (alpha <= 1))).nonzero().flatten().tolist():
            raise ValueError(f"alpha must be in [0, 1]; alpha[{position}] is {alpha[position].item()}")


def per_sample(alpha: Tensor, like: Tensor) -> Tensor:
    return alpha.reshape(-1, *[1] * (like.dim() - 1))


def backward_reference(
    grad: Tensor, foreground: Tensor | None, background: Tensor | None, call: BlendCall, needs: Sequence[bool]
) -> Gradients:
    alpha, value, index, background_rows = call
    dtype, grad = grad.dtype, widen(grad)
    weight = value if alpha is None else per_sample(alpha.to(grad.dtype), grad)
    to_front = (weight * grad).to(dtype) if needs[0] else None
    to_back = None
    if needs[1]:
        to_back = (1 - weight) * grad
        if index is not None:
            to_back = grad.new_zeros((background_rows, *grad.shape[1:])).index_add(0, index, to_back)
        to_back = to_back.to(dtype)
    by_alpha = None
    if needs[2]:
        assert foreground is not None
        assert background is not None
        assert alpha is not None
        difference = widen(foreground) - widen(background if index is None else background[index])
        by_alpha = (grad * difference).flatten(1).sum(1) if grad.dim() > 1 else grad * difference
        by_alpha = by_alpha.to(alpha.dtype)
    return to_front, to_back, by_alpha


def second_derivative(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the backward pass, so that autograd can take any higher derivative."""
    grad, foreground, background, alpha, index = ctx.saved_tensors
    value, needs = ctx.settings
    dtype, grad = grad.dtype, widen(grad)
    to_own, to_other, to_alpha = (widen(g) if need else None for g, need in zip(grads, needs, strict=True))
    weight = value if alpha is None else per_sample(alpha.to(grad.dtype), grad)
    picked = None if to_other is None else to_other if index is None else to_other[index]
    total = torch.zeros_like(grad)
    if to_own is not None:
        total = total + weight * to_own
    if picked is not None:
        total = total + (1 - weight) * picked
    by_alpha = by_foreground = by_background = None
    if to_alpha is not None:
        scale = per_sample(to_alpha.to(grad.dtype), grad)
        total = total + scale * (widen(foreground) - widen(background if index is None else background[index]))
        by_foreground = scale * grad
        by_background = -by_foreground
        if index is not None:
            by_background = grad.new_zeros(background.shape).index_add(0, index, by_background)
        by_foreground, by_background = by_foreground.to(dtype), by_background.to(dtype)
    if alpha is not None and (to_own is not None or picked is not None):
        product = grad * ((0 if to_own is None else to_own) - (0 if picked is None else picked))
        by_alpha = (product.flatten(1).sum(1) if grad.dim() > 1 else product).to(alpha.dtype)
    return (total.to(dtype), by_foreground, by_background, by_alpha, None, None, None, None, None, None)
