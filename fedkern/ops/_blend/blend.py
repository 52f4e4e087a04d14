"""blend: each sample's feature map mixed with another sample's background, also as operators of ``torch.library``."""

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._blend.kernels import BlendCall, BlendKernels, check_memory, output_strides
from fedkern.ops._blend.reference import backward_reference, blend_reference, check_values, second_derivative
from fedkern.ops._core import backend, library
from fedkern.ops._core.backend import eager, select, select_ordinary
from fedkern.ops._core.checks import check_device, check_floating, check_number, check_tensor
from fedkern.ops._core.library import Context, EagerFunction, saved_tensors

Inputs = tuple[Tensor, Tensor, Tensor | None, float, Tensor | None]


def _reference(
    foreground: Tensor, background: Tensor, alpha: Tensor | None, value: float, index: Tensor | None
) -> Tensor:
    return blend_reference(foreground, background, value if alpha is None else alpha, index)


def _implementation(foreground: Tensor, background: Tensor, *settings: Any) -> Tensor:
    alpha, value, index = settings
    call = BlendCall(alpha, value, index, background.shape[0])
    kernel: BlendKernels | None = backend.select("blend", foreground, background)
    if kernel is not None:
        return kernel.forward(foreground, background, call)
    check_values(call)
    return _fake(foreground).copy_(_reference(foreground, background, *settings))


def _fake(foreground: Tensor, *_: object) -> Tensor:
    return foreground.new_empty_strided(foreground.shape, output_strides(foreground.shape, foreground.stride()))


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


def _backward_implementation(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    foreground, background, alpha, value, index, rows, *needs = arguments
    call = BlendCall(alpha, value, index, rows)
    check_memory(foreground, background, call)
    kernel = backend.select("blend", grad)
    result = (backward_reference if kernel is None else kernel.backward)(grad, foreground, background, call, needs)
    return tuple(map(library.laid_out, result, _backward_fake(grad, *arguments)))


def _backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, _, alpha, _, _, rows, *needs = arguments
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


_new = tuple.__new__  # makes a named tuple in half the time that its own constructor takes


def blend(
    foreground: Tensor, background: Tensor, alpha: float | Tensor = 0.5, *, index: Tensor | None = None
) -> Tensor:
    """Mix each sample's feature map with another sample's background (FedGID, arXiv 2504.00850).

    ``out[b] = alpha[b] * foreground[b] + (1 - alpha[b]) * background[index[b]]``; the permuted background is never
    materialised.

    Args:
        foreground: ``[B, *S]``, fp32, bf16, fp16 or fp64, of any layout; the result has its memory format.
        background: ``[N, *S]``, on the same device.
        alpha: weight of the foreground in [0, 1]: a number, or a floating tensor ``[B]`` or ``[]``.
        index: ``int64 [B]`` with values in ``[0, N)``; default: sample b is mixed with background b, and N = B.

    Returns:
        ``[B, *S]``, of the promoted dtype of both maps. fp32, bf16 and fp16 are computed in fp32 and rounded once.
        Every gradient has the dtype of its own tensor.

    Differentiable in foreground, background and a tensor alpha. The gradient of a background row is a sum over the
    samples that used the row, in ascending order: the same bits every time. Works under torch.compile (one graph
    node), torch.func.grad, vmap and for second derivatives.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device or shape is wrong; on the CPU also a value of index or
            alpha out of range. On CUDA an index out of range is a device assertion.
        RuntimeError: a forced backend does not support the call.
    """
    kernel: BlendKernels | None = select_ordinary("blend", foreground, background, alpha, index)
    weights: Tensor | None = None
    value = 0.5
    if kernel is None:
        _check(foreground, background, alpha, index)
    if type(alpha) is float or not isinstance(alpha, Tensor):  # in this order: isinstance takes longer
        value = alpha
    else:
        weights = alpha
    if kernel is None:
        if weights is None and torch.compiler.is_compiling():
            weights, value = library.number_tensor(value).to(foreground.device), 0.5
        if background.dtype != foreground.dtype:
            dtype = torch.promote_types(foreground.dtype, background.dtype)
            foreground, background = foreground.to(dtype), background.to(dtype)
        if weights is not None and not weights.dim():
            # In fp64, so that the gradient of one weight is summed over the samples before it is rounded.
            weights = weights.to(torch.float64).expand(foreground.shape[0])
        tensors = [tensor for tensor in (foreground, background, weights, index) if tensor is not None]
        if not eager(*tensors):
            return BLEND(foreground, background, weights, value, index)
        if weights is not None:
            weights = weights.resolve_neg()  # kernels read memory as it is
        kernel = select("blend", foreground, background)
    call = _new(BlendCall, (weights, value, index, background.shape[0]))
    if kernel is None:
        check_values(call)
        return blend_reference(foreground, background, value if weights is None else weights, index)
    if torch.is_grad_enabled() and (
        foreground.requires_grad or background.requires_grad or (weights is not None and weights.requires_grad)
    ):
        return _Blend.call(kernel, call, foreground, background, weights)
    return kernel.forward(foreground, background, call)


def _check(foreground: Tensor, background: Tensor, alpha: float | Tensor, index: Tensor | None) -> None:
    for name, tensor in (("foreground", foreground), ("background", background)):
        check_floating(tensor, name)
        if not tensor.dim():
            raise ValueError(f"{name} must have shape [B, *S], but has []")
    check_device(background, "background", foreground, "foreground")
    rows, shape = foreground.shape[0], foreground.shape[1:]
    if background.shape[1:] != shape:
        raise ValueError(f"background must have shape {['N', *shape]}, but has {list(background.shape)}")
    if index is None:
        if background.shape[0] != rows:
            raise ValueError(
                f"background must have foreground's {rows} rows when no index is given, but has {background.shape[0]}"
            )
    else:
        check_tensor(index, "index")
        if index.dtype != torch.int64:
            raise TypeError(f"index must have dtype int64, but has {index.dtype}")
        if index.shape != (rows,):
            raise ValueError(f"index must have shape [{rows}], but has {list(index.shape)}")
        check_device(index, "index", foreground, "foreground")
    if isinstance(alpha, Tensor):
        check_floating(alpha, "alpha")
        if alpha.dim() and alpha.shape != (rows,):
            raise ValueError(f"alpha must have shape [{rows}] or [], but has {list(alpha.shape)}")
        check_device(alpha, "alpha", foreground, "foreground")
    else:
        check_number(alpha, "alpha", 1)


class _Blend(EagerFunction):
    @staticmethod
    def forward(
        ctx: Context,
        kernel: BlendKernels,
        call: BlendCall,
        foreground: Tensor,
        background: Tensor,
        alpha: Tensor | None,
    ) -> Tensor:
        out = kernel.forward(foreground, background, call)
        if alpha is None:
            ctx.save_for_backward(call.indices)
        else:
            # Only the gradient of alpha needs the values of the inputs.
            need = ctx.needs_input_grad[4]
            ctx.save_for_backward(call.indices, foreground if need else None, background if need else None, alpha)
        ctx.settings = (kernel, call.value, call.background_rows, out.stride())
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = saved_tensors(ctx)
        index, foreground, background, alpha = saved if len(saved) > 1 else (saved[0], None, None, None)
        needs = ctx.needs_input_grad[2:]
        kernel, value, background_rows, strides = ctx.settings
        call = BlendCall(alpha, value, index, background_rows)
        check_memory(foreground, background, call)
        if not backend.is_readable(grad) or grad.is_neg():
            # Recorded (create_graph=True) or batched (is_grads_batched=True): the library operator has rules for both.
            gradients = BLEND_BACKWARD(grad, foreground, background, *call, *needs)
            return (None, None, *(g if need else None for g, need in zip(gradients, needs, strict=True)))
        return (None, None, *kernel.backward(grad, foreground, background, call, needs, strides))


backend.add_kernels(
    "blend", cpu=BlendKernels, cuda=BlendKernels, triton="_blend.triton.blend:TritonBlend", fits="blend_fits"
)
