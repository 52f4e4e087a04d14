"""contrastive in ``torch.library``: an operator for torch.compile, dispatch modes and opcheck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._contrast.reference import ContrastCall, contrastive_reference
from fedkern.ops._core import library
from fedkern.ops._core.backend import compute_dtype, select
from fedkern.ops._core.function import Context

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def reference_at(temperature: Any) -> Any:
    def loss(x: Tensor, y: Tensor, learnt: Tensor | None = None) -> Tensor:
        return contrastive_reference(x, y, temperature if learnt is None else learnt)

    return loss


def _loss_alone(x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float, *needs: bool) -> tuple[Tensor]:
    return (reference_at(temperature)(x, y, learnt),)


def _run(x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float, *needs: bool) -> Results:
    """Return the loss and, already in the forward pass, the gradients that ``needs`` asks for."""
    if x.dim() != 2 or x.shape != y.shape:
        raise ValueError(f"x and y must have one shape [B, D], but have {list(x.shape)} and {list(y.shape)}")
    if learnt is not None and learnt.dim():
        raise ValueError(f"a learnt temperature must be a 0-d tensor, but has shape {list(learnt.shape)}")
    kernel, call = select("contrastive", x, y), ContrastCall(x, y, temperature if learnt is None else learnt)
    compute = compute_dtype(torch.promote_types(x.dtype, y.dtype))
    gradients: Sequence[Tensor | None] = (None, None, None)
    if kernel is None:
        loss = contrastive_reference(*call)
        wide = [t if t is None else t.to(compute) for t in (x, y, learnt)]
        unit = loss.new_ones((), dtype=compute)
        gradients = library.differentiate_reference(reference_at(temperature), wide, needs, unit, twice=False)
    elif any(needs):
        loss, gradients = kernel.loss_and_gradients(call, needs)
    else:
        loss = kernel.loss(call)
    a, b, c = (
        _nothing(x) if g is None or not need else g.to(compute).contiguous()
        for g, need in zip(gradients, needs, strict=True)
    )
    return loss, a, b, c


def _fake(x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float, *needs: bool) -> Results:
    dtype = torch.promote_types(x.dtype, y.dtype)
    a, b, c = (
        x.new_empty(shape, dtype=compute_dtype(dtype)) if need else _nothing(x)
        for shape, need in zip((x.shape, x.shape, ()), needs, strict=True)
    )
    return x.new_empty((), dtype=dtype), a, b, c


def _nothing(x: Tensor) -> Tensor:
    return torch.empty(0, device=x.device)


def _setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.settings = inputs[3:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _backward(ctx: Context, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    temperature, *needs = ctx.settings
    inputs, gradients = saved[:3], saved[3:]
    results: Sequence[Tensor | None]
    if torch.is_grad_enabled():  # create_graph=True
        results = library.differentiate_reference(reference_at(temperature), inputs, needs, grad)
    else:
        results = [
            (g * grad).to(t.dtype) if need and t is not None else None
            for g, t, need in zip(gradients, inputs, needs, strict=True)
        ]
    return (*results, *[None] * 4)


CONTRASTIVE = library.register(
    "contrastive",
    "(Tensor x, Tensor y, Tensor? learnt, float temperature, bool need_x, bool need_y, bool need_temperature) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    reference=_loss_alone,
)
