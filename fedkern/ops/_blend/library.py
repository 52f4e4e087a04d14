"""blend in ``torch.library``: shapes, gradients and batching rules for torch.compile, torch.func and opcheck."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._blend.kernels import BlendCall, BlendKernels, check_memory, output_strides
from fedkern.ops._blend.reference import backward_reference, blend_reference, check_values, second_derivative
from fedkern.ops._core import backend, library
from fedkern.ops._core.function import Context

Inputs = tuple[Tensor, Tensor, Tensor | None, float, Tensor | None]


def _reference(
    foreground: Tensor, background: Tensor, alpha: Tensor | None, value: float, index: Tensor | None
) -> Tensor:
    return blend_reference(foreground, background, value if alpha is None else alpha, index)


def _implementation(foreground: Tensor, background: Tensor, *others: Any) -> Tensor:
    alpha, value, index = others
    call = BlendCall(alpha, value, index, background.shape[0])
    kernel: BlendKernels | None = backend.select("blend", foreground, background)
    if kernel is not None:
        return kernel.forward(foreground, background, call)
    check_values(call)
    return _fake(foreground).copy_(_reference(foreground, background, *others))


def _fake(foreground: Tensor, *others: object) -> Tensor:
    strides = output_strides(foreground.shape, foreground.stride())
    return torch.empty_strided(foreground.shape, strides, dtype=foreground.dtype, device=foreground.device)


def _setup_context(ctx: Context, inputs: Inputs, output: Tensor) -> None:
    foreground, background, alpha, value, index = inputs
    need = ctx.needs_input_grad[2]
    ctx.save_for_backward(foreground if need else None, background if need else None, alpha, index)
    ctx.settings = value, background.shape[0]


def _backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    foreground, background, alpha, index = ctx.saved_tensors
    value, rows = ctx.settings
    needs = ctx.needs_input_grad[:3]
    gradients = BLEND_BACKWARD(grad, foreground, background, alpha, value, index, rows, *needs)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None)


def _backward_implementation(grad: Tensor, *others: Any) -> tuple[Tensor, ...]:
    foreground, background, alpha, value, index, rows, *needs = others
    call = BlendCall(alpha, value, index, rows)
    check_memory(foreground, background, call)
    kernel = backend.select("blend", grad)
    run = backward_reference if kernel is None else kernel.backward
    result = run(grad, foreground, background, call, needs)
    return tuple(map(library.laid_out, result, _backward_fake(grad, *others)))


def _backward_fake(grad: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _, _, alpha, _, _, rows, *needs = others
    strides = output_strides(grad.shape, grad.stride())
    to_front = grad.new_empty_strided(grad.shape, strides) if needs[0] else grad.new_empty(0)
    to_back = grad.new_empty_strided((rows, *grad.shape[1:]), strides) if needs[1] else grad.new_empty(0)
    return to_front, to_back, alpha.new_empty(alpha.shape) if needs[2] else grad.new_empty(0)


def _setup_second(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, foreground, background, alpha, value, index, _, *needs = inputs
    ctx.save_for_backward(grad, foreground, background, alpha, index)
    ctx.settings = value, needs


def _fold_index(index: Tensor, axis: int | None, count: int, rows: int) -> Tensor:
    """Return the indices into ``count`` concatenated backgrounds. An index out of range stays out of range."""
    mapped = library.mapped_first(index, axis, count)
    shifted = mapped + rows * torch.arange(count, device=index.device)[:, None]
    return torch.where((mapped < 0) | (mapped >= rows), count * rows, shifted).flatten()


def _vmap(info: library.Mapped, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
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
    info: library.Mapped, in_dims: tuple[int | None, ...], *arguments: Any
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
