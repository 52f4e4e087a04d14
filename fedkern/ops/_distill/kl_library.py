"""kl_div and dual_kl in ``torch.library``: one operator for torch.compile, torch.func, vmap and opcheck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core import library
from fedkern.ops._core.backend import select
from fedkern.ops._distill.common import NONE, reduce_mapped, row_shape, spread_mapped, unmapped
from fedkern.ops._distill.kernels import DistillKernel, divergence_settings
from fedkern.ops._distill.library import place
from fedkern.ops._distill.reference import divergence_reference, result_dtype


def _kernel(*inputs: Tensor | None) -> DistillKernel | None:
    return select("kl_div" if inputs[1] is None else "dual_kl", *[t for t in inputs if t is not None])


def _run(student: Tensor, other: Tensor | None, teacher: Tensor, weight: Tensor | None, *settings: Any) -> Tensor:
    kernel = _kernel(student, other, teacher, weight)
    if kernel is None:
        return divergence_reference(student, other, teacher, weight, *settings)
    return kernel.divergence_forward(student, other, teacher, weight, divergence_settings(*settings))


def _fake(student: Tensor, other: Tensor | None, teacher: Tensor, weight: Tensor | None, *settings: Any) -> Tensor:
    shape = row_shape(student) if settings[-1] == NONE else ()
    return torch.empty(shape, dtype=result_dtype(student, other, teacher), device=student.device)


def _run_backward(
    grad: Tensor, student: Tensor, other: Tensor | None, teacher: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, settings, needs = (student, other, teacher, weight), rest[:3], rest[3:]
    kernel = _kernel(*inputs)
    gradients: Sequence[Tensor | None]
    if kernel is None:
        needed = [None if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
        gradients = library.differentiate_reference(
            lambda *tensors: divergence_reference(*tensors, *settings), needed, needs, grad
        )
    else:
        gradients = kernel.divergence_backward(grad, *inputs, divergence_settings(*settings), needs)
    a, b, c, d = place(gradients, inputs, needs)
    return a, b, c, d


def _fake_backward(
    grad: Tensor, student: Tensor, other: Tensor | None, teacher: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return place([None] * 4, (student, other, teacher, weight), rest[3:])


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
    """Derivative of the backward pass, through the reference: torch.func.vjp composes with transforms around it."""
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


def _fold(tensor: Tensor | None, axis: int | None, count: int) -> Tensor | None:
    return None if tensor is None else unmapped(tensor, axis, count).flatten(0, 1)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, int]:
    count = info.batch_size
    folded = [_fold(t, d, count) for t, d in zip((student, other, teacher, weight), in_dims[:4], strict=True)]
    *how, reduction = settings
    rows = DIVERGENCE(*folded, *how, NONE)
    return reduce_mapped(rows.unflatten(0, (count, rows.shape[0] // count)), reduction), 0


def _vmap_backward(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad: Tensor,
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    *rest: Any,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    count = info.batch_size
    (temperature, reverse, reduction), needs = rest[:3], rest[3:]
    folded = [_fold(t, d, count) for t, d in zip((student, other, teacher, weight), in_dims[1:5], strict=True)]
    logits = folded[0]
    assert logits is not None
    size = logits.shape[0] // count
    g = spread_mapped(grad, in_dims[0], count, (size, *logits.shape[2:]), reduction)
    results = DIVERGENCE_BACKWARD(g, *folded, temperature, reverse, NONE, *needs)
    back = tuple(r.unflatten(0, (count, size)) if need else r for r, need in zip(results, needs, strict=True))
    return back, tuple(0 if need else None for need in needs)


_ARGUMENTS = (
    "Tensor student, Tensor? other, Tensor teacher, Tensor? weight, float temperature, bool reverse, int reduction"
)

DIVERGENCE = library.register(
    "divergence",
    f"({_ARGUMENTS}) -> Tensor",
    _run,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    reference=divergence_reference,
)
DIVERGENCE_BACKWARD = library.register(
    "divergence_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool need_student, bool need_other, bool need_teacher, bool need_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    fake=_fake_backward,
    setup_context=_setup_second,
    backward=_second,
    vmap=_vmap_backward,
)
