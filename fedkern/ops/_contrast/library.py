"""contrastive in ``torch.library``: operators for torch.compile, torch.func, vmap and opcheck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._contrast.kernels import CpuContrast
from fedkern.ops._contrast.reference import ContrastCall, Gradients, contrastive_reference, gradients_reference
from fedkern.ops._contrast.tiled import TiledContrast
from fedkern.ops._core import library
from fedkern.ops._core.backend import compute_dtype, select


def _kernel(
    x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float
) -> tuple[CpuContrast | TiledContrast | None, ContrastCall]:
    """The kernel that serves a call, and the call."""
    if x.dim() != 2 or x.shape != y.shape:
        raise ValueError(f"x and y must have one shape [B, D], but have {list(x.shape)} and {list(y.shape)}")
    if learnt is not None and learnt.dim():
        raise ValueError(f"a learnt temperature must be a 0-d tensor, but has shape {list(learnt.shape)}")
    return select("contrastive", x, y), ContrastCall(x, y, temperature if learnt is None else learnt)


def _run(x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    kernel, call = _kernel(x, y, learnt, temperature)
    if kernel is None:
        loss = contrastive_reference(*call)
        return loss, x.new_zeros((4, x.shape[0]), dtype=compute_dtype(loss.dtype))  # gradients_reference needs none
    return kernel.loss_and_sums(call)


def _loss_alone(x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float, *needs: bool) -> tuple[Tensor]:
    """The reference of both operators: only the loss, of all that :func:`_run` and :func:`_run_training` return."""
    return (reference_at(temperature)(x, y, learnt),)


def _fake(x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.new_empty((), dtype=dtype), x.new_empty((4, x.shape[0]), dtype=compute_dtype(dtype))


def _run_backward(
    grad: Tensor, x: Tensor, y: Tensor, learnt: Tensor | None, sums: Tensor, temperature: float, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernel, call = _kernel(x, y, learnt, temperature)
    inputs = (x, y, learnt)
    if kernel is None:
        raw = gradients_reference(grad, *call)
    else:
        raw = kernel.gradients(call, sums, needs)
        raw = Gradients(*kernel.scaled(raw, grad, inputs))
    a, b, c = (
        _nothing(x) if t is None or g is None or not need else library.laid_out(g, torch.empty_like(t))
        for g, t, need in zip(raw, inputs, needs, strict=True)
    )
    return a, b, c


def _fake_backward(
    grad: Tensor, x: Tensor, y: Tensor, learnt: Tensor | None, sums: Tensor, temperature: float, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (
        torch.empty_like(t) if need and t is not None else _nothing(x)
        for t, need in zip((x, y, learnt), needs, strict=True)
    )
    return a, b, c


def _nothing(x: Tensor) -> Tensor:
    return torch.empty(0, device=x.device)


def reference_at(temperature: Any) -> Any:
    """The reference at ``temperature``, or at a learnt one."""

    def loss(x: Tensor, y: Tensor, learnt: Tensor | None = None) -> Tensor:
        return contrastive_reference(x, y, temperature if learnt is None else learnt)

    return loss


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, learnt, ctx.temperature = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, y, learnt, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    gradients = CONTRASTIVE_BACKWARD(grad, *ctx.saved_tensors, ctx.temperature, *needs)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.temperature, *ctx.needs = inputs[5:]


def _second(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Derivative of the backward pass, through the reference, which computes the sums again."""
    loss = reference_at(ctx.temperature)
    return (*library.second_derivative(loss, 1, ctx.saved_tensors, ctx.needs, cotangents), *[None] * 5)


# The operator for training under a compiler or a mode: gradients in the forward pass, as in eager calls.


def _run_training(
    x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float, *needs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel, call = _kernel(x, y, learnt, temperature)
    if kernel is None:
        loss = contrastive_reference(*call)
        gradients = gradients_reference(torch.ones_like(loss), *call)
    else:
        loss, gradients = kernel.loss_and_gradients(call, needs)
    compute = compute_dtype(loss.dtype)
    a, b, c = (
        _nothing(x) if g is None or not need else g.to(compute).contiguous()
        for g, need in zip(gradients, needs, strict=True)
    )
    return loss, a, b, c


def _fake_training(
    x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float, *needs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    a, b, c = (
        x.new_empty(shape, dtype=compute_dtype(dtype)) if need else _nothing(x)
        for shape, need in zip((x.shape, x.shape, ()), needs, strict=True)
    )
    return x.new_empty((), dtype=dtype), a, b, c


def _setup_training(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.temperature, *ctx.needs = inputs[3:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _backward_training(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    inputs, gradients = saved[:3], saved[3:]
    results: Sequence[Tensor | None]
    if torch.is_grad_enabled():  # create_graph=True
        results = library.differentiate_reference(reference_at(ctx.temperature), inputs, ctx.needs, grad)
    else:
        results = [
            (g * grad).to(t.dtype) if need and t is not None else None
            for g, t, need in zip(gradients, inputs, ctx.needs, strict=True)
        ]
    return (*results, *[None] * 4)


def _each(info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> list[list[Any]]:
    """The arguments of every mapped call: each call has its own batch, so calls cannot be merged into a larger one."""
    return [
        [a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)]
        for i in range(info.batch_size)
    ]


def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    losses, sums = zip(*(CONTRASTIVE(*call) for call in _each(info, in_dims, arguments)), strict=True)
    return (torch.stack(losses), torch.stack(sums)), (0, 0)


def _vmap_backward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    calls = [CONTRASTIVE_BACKWARD(*call) for call in _each(info, in_dims, arguments)]
    needs = arguments[6:]
    results = tuple(
        torch.stack(gradients) if need else gradients[0]
        for gradients, need in zip(zip(*calls, strict=True), needs, strict=True)
    )
    return results, tuple(0 if need else None for need in needs)


CONTRASTIVE = library.register(
    "contrastive", "(Tensor x, Tensor y, Tensor? learnt, float temperature) -> (Tensor, Tensor)", _run, fake=_fake,
    setup_context=_setup_context, backward=_backward, vmap=_vmap, reference=_loss_alone,
)  # fmt: skip
CONTRASTIVE_BACKWARD = library.register(
    "contrastive_backward",
    "(Tensor grad, Tensor x, Tensor y, Tensor? learnt, Tensor sums, float temperature, bool need_x, bool need_y, "
    "bool need_temperature) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    fake=_fake_backward,
    setup_context=_setup_second,
    backward=_second,
    vmap=_vmap_backward,
)
CONTRASTIVE_TRAINING = library.register(
    "contrastive_training",
    "(Tensor x, Tensor y, Tensor? learnt, float temperature, bool need_x, bool need_y, bool need_temperature) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run_training,
    fake=_fake_training,
    setup_context=_setup_training,
    backward=_backward_training,
    reference=_loss_alone,
)
