"""blend: each sample's feature map mixed with another sample's background."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkern.ops._blend.kernels import BlendCall, BlendKernels, check_memory
from fedkern.ops._blend.library import BLEND, BLEND_BACKWARD
from fedkern.ops._blend.reference import blend_reference, check_values
from fedkern.ops._core import backend, library
from fedkern.ops._core.backend import eager, select, select_ordinary
from fedkern.ops._core.checks import check_device, check_floating, check_number, check_tensor
from fedkern.ops._core.function import Context, EagerFunction, saved_tensors

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
