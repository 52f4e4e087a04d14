"""kl_div and dual_kl in ``torch.library``: one operator for torch.compile, torch.func, vmap and opcheck."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops import _library
from fedkern.ops.backend import select
from fedkern.ops.distill_common import BATCHMEAN, NONE, row_count, row_shape
from fedkern.ops.distill_launch import divergence_backward, divergence_forward
from fedkern.ops.distill_reference import divergence_reference, result_dtype


def _run(
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: int,
) -> Tensor:
    tensors = [t for t in (student, other, teacher, weight) if t is not None]
    core = select("kl_div" if other is None else "dual_kl", *tensors)
    run = divergence_reference if core is None else functools.partial(divergence_forward, core)
    return run(student, other, teacher, weight, temperature, reverse, reduction)


def _fake(
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: int,
) -> Tensor:
    shape = row_shape(student) if reduction == NONE else ()
    return torch.empty(shape, dtype=result_dtype(student, other, teacher), device=student.device)


def _run_backward(
    grad: Tensor,
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: int,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (student, other, teacher, weight)
    core = select("kl_div" if other is None else "dual_kl", *[t for t in inputs if t is not None])
    if core is None:
        needed = [None if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
        gradients = _library.differentiate_reference(
            lambda s, o, t, w: divergence_reference(s, o, t, w, temperature, reverse, reduction), needed, needs, grad
        )
    else:
        gradients = divergence_backward(core, grad, *inputs, temperature, reverse, reduction, needs)
    return _placed(gradients, inputs, needs)


def _placed(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's four results: an empty tensor stands for a gradient nobody wants."""
    device = next(t.device for t in inputs if t is not None)
    a, b, c, d = (
        torch.empty(0, device=device)
        if x is None or not need
        else torch.empty_like(x)
        if gradient is None
        else torch.empty_like(x).copy_(gradient)
        if gradient.stride() != x.stride()
        else gradient.detach()
        for gradient, x, need in zip(gradients, inputs, needs, strict=True)
    )
    return a, b, c, d


def _fake_backward(
    grad: Tensor,
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: int,
    *needs: bool,
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(0, device=student.device) if x is None or not need else torch.empty_like(x)
        for x, need in zip((student, other, teacher, weight), needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, other, teacher, weight, *settings = inputs
    ctx.save_for_backward(student, other, teacher, weight)
    ctx.settings = settings


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:4]]
    gradients = DIVERGENCE_BACKWARD(grad, *ctx.saved_tensors, *ctx.settings, *needs)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _second(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Derivative of the backward pass, through the reference: torch.func.vjp composes with whatever is around it."""
    *settings, need_student, need_other, need_teacher, need_weight = ctx.settings
    wanted = (need_student, need_other, need_teacher, need_weight)
    saved = ctx.saved_tensors
    present = [i for i in range(5) if saved[i] is not None]

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        full: list[Any] = [None] * 5
        for i, tensor in zip(present, tensors, strict=True):
            full[i] = tensor
        chosen = [i for i in range(1, 5) if wanted[i - 1] and full[i] is not None]

        def loss(*selected: Tensor) -> Tensor:
            inputs = list(full)
            for i, tensor in zip(chosen, selected, strict=True):
                inputs[i] = tensor
            return divergence_reference(*inputs[1:], *settings)

        pull = torch.func.vjp(loss, *(full[i] for i in chosen))[1]
        return pull(full[0])

    cotangents = tuple(g for g, need, x in zip(grads, wanted, saved[1:], strict=True) if need and x is not None)
    pull = torch.func.vjp(gradients, *(saved[i] for i in present))[1]
    results: list[Tensor | None] = [None] * 5
    for i, result in zip(present, pull(cotangents), strict=True):
        results[i] = result
    return (*results, *[None] * 7)


def _unmapped(tensor: Tensor | None, axis: int | None, count: int) -> Tensor | None:
    """``[V, B, ...]`` with the mapped axis in front, repeated where the tensor is not mapped."""
    if tensor is None:
        return None
    return tensor.expand(count, *tensor.shape) if axis is None else tensor.movedim(axis, 0)


def _fold(tensor: Tensor | None, axis: int | None, count: int) -> Tensor | None:
    tensor = _unmapped(tensor, axis, count)
    return None if tensor is None else tensor.flatten(0, 1)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: int,
) -> tuple[Tensor, int]:
    count = info.batch_size
    folded = [_fold(t, d, count) for t, d in zip((student, other, teacher, weight), in_dims[:4], strict=True)]
    rows = DIVERGENCE(*folded, temperature, reverse, NONE)
    logits = _unmapped(student, in_dims[0], count)
    assert logits is not None
    rows = rows.unflatten(0, logits.shape[:2])
    if reduction == NONE:
        return rows, 0
    total = rows.flatten(1).sum(1)
    return total if reduction != BATCHMEAN else total / max(rows[0].numel(), 1), 0


def _vmap_backward(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad: Tensor,
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: int,
    *needs: bool,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    count = info.batch_size
    each = [_unmapped(t, d, count) for t, d in zip((student, other, teacher, weight), in_dims[1:5], strict=True)]
    logits = each[0]
    assert logits is not None
    size = logits.shape[1]
    rows = row_shape(logits[0])
    g = _unmapped(grad, in_dims[0], count)
    assert g is not None
    if reduction != NONE:
        # Every mapped sample has its own scalar: spread over its rows it is a grad_output per row.
        if reduction == BATCHMEAN:
            g = g / max(row_count(logits[0]), 1)
        g = g.reshape(count, *[1] * len(rows)).expand(count, *rows)
    folded = [None if t is None else t.flatten(0, 1) for t in each]
    results = DIVERGENCE_BACKWARD(g.flatten(0, 1), *folded, temperature, reverse, NONE, *needs)
    back = tuple(r.unflatten(0, (count, size)) if need else r for r, need in zip(results, needs, strict=True))
    return back, tuple(0 if need else None for need in needs)


_ARGUMENTS = (
    "Tensor student, Tensor? other, Tensor teacher, Tensor? weight, float temperature, bool reverse, int reduction"
)

DIVERGENCE = _library.register(
    "divergence",
    f"({_ARGUMENTS}) -> Tensor",
    _run,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
)
DIVERGENCE_BACKWARD = _library.register(
    "divergence_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool need_student, bool need_other, bool need_teacher, bool need_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    fake=_fake_backward,
    setup_context=_setup_second,
    backward=_second,
    vmap=_vmap_backward,
)
