"""blend in ``torch.library``: shapes, gradients and batching rules for torch.compile, torch.func and opcheck."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._blend.kernels import BlendCall, check_memory, output_strides
from fedkern.ops._blend.reference import backward_reference, blend_reference, check_values, second_derivative
from fedkern.ops._core import backend, library


def _reference(
    foreground: Tensor, background: Tensor, alpha: Tensor | None, value: float, index: Tensor | None
) -> Tensor:
    return blend_reference(foreground, background, value if alpha is None else alpha, index)


def _implementation(foreground: Tensor, background: Tensor, *others: Any) -> Tensor:
    alpha, value, index = others
    call = BlendCall(alpha, value, index, background.shape[0])
    kernel = backend.select("blend", foreground, background)
    if kernel is not None:
        return kernel.forward(foreground, background, call)
    check_values(call)
    return _fake(foreground).copy_(_reference(foreground, background, *others))


def _fake(foreground: Tensor, *others: Any) -> Tensor:
    strides = output_strides(foreground.shape, foreground.stride())
    return torch.empty_strided(foreground.shape, strides, dtype=foreground.dtype, device=foreground.device)


def _backward_implementation(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    foreground, background, *settings, need_foreground, need_background, need_alpha = others
    call = BlendCall(*settings)
    check_memory(foreground, background, call)
    kernel = backend.select("blend", grad)
    run: Any = backward_reference if kernel is None else kernel.backward
    result = run(grad, foreground, background, call, (need_foreground, need_background, need_alpha))
    to_front, to_back, per_sample = map(library.laid_out, result, _backward_fake(grad, *others))
    return to_front, to_back, per_sample


def _backward_fake(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, alpha, _, _, background_rows, *needs = others
    strides = output_strides(grad.shape, grad.stride())
    to_front = grad.new_empty_strided(grad.shape, strides) if needs[0] else grad.new_empty(0)
    to_back = grad.new_empty_strided((background_rows, *grad.shape[1:]), strides) if needs[1] else grad.new_empty(0)
    return to_front, to_back, alpha.new_empty(alpha.shape) if needs[2] else grad.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    foreground, background, alpha, value, index = inputs
    need = ctx.needs_input_grad[2]
    ctx.save_for_backward(foreground if need else None, background if need else None, alpha, index)
    ctx.value, ctx.background_rows = value, background.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    foreground, background, alpha, index = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = BLEND_BACKWARD(grad, foreground, background, alpha, ctx.value, index, ctx.background_rows, *needs)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, foreground, background, alpha, value, index, background_rows, *needs = inputs
    ctx.save_for_backward(grad, foreground, background, alpha, index)
    ctx.value, ctx.background_rows, ctx.needs = value, background_rows, needs


def _fold_index(index: Tensor, axis: int | None, count: int, rows: int) -> Tensor:
    """Indices into ``count`` backgrounds of ``rows`` rows in sequence.

    An index out of range stays out of range.
    """
    mapped = library.mapped_first(index, axis, count)
    shifted = mapped + rows * torch.arange(count, device=index.device)[:, None]
    return torch.where((mapped < 0) | (mapped >= rows), count * rows, shifted).flatten()


def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    foreground, background, alpha, value, index = arguments
    count = info.batch_size
    fore, back, weights, _, positions = in_dims
    folded = library.fold_mapped(foreground, fore, count)
    if back is None:
        # One background for all: index into it instead of repeating it.
        if index is None:
            index, positions = torch.arange(background.shape[0], device=background.device), None
        index = library.fold_mapped(index, positions, count)
    else:
        if index is not None:
            index = _fold_index(index, positions, count, background.movedim(back, 0).shape[1])
        background = library.fold_mapped(background, back, count)
    if alpha is not None:
        alpha = library.fold_mapped(alpha, weights, count)
    out = BLEND(folded, background, alpha, value, index)
    return out.unflatten(0, (count, -1) if len(out) else (count, 0)), 0


def _vmap_backward(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    value, index, background_rows, *needs = arguments[4:]
    count = info.batch_size
    tensors: list[Tensor | None] = [
        None if tensor is None else library.fold_mapped(tensor, axis, count)
        for tensor, axis in zip(arguments[:4], in_dims[:4], strict=True)
    ]
    if index is not None:
        index = _fold_index(index, in_dims[5], count, background_rows)
    folded = BLEND_BACKWARD(*tensors, value, index, count * background_rows, *needs)
    results = tuple(
        result.unflatten(0, (count, len(result) // count)) if need else result
        for result, need in zip(folded, needs, strict=True)
    )
    return results, tuple(0 if need else None for need in needs)


BLEND = library.register(
    "blend", "(Tensor foreground, Tensor background, Tensor? alpha, float value, Tensor? index) -> Tensor",
    _implementation, fake=_fake, setup_context=_setup_context, backward=_backward, vmap=_vmap, reference=_reference,
)  # fmt: skip
BLEND_BACKWARD = library.register(
    "blend_backward",
    "(Tensor grad, Tensor? foreground, Tensor? background, Tensor? alpha, float value, Tensor? index, "
    "SymInt background_rows, bool need_foreground, bool need_background, bool need_alpha) -> (Tensor, Tensor, Tensor)",
    _backward_implementation,
    fake=_backward_fake,
    setup_context=_setup_second,
    backward=second_derivative,
    vmap=_vmap_backward,
)
