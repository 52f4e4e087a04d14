"""conv_pool: a 3x3 or 5x5 convolution, bias, ReLU and max pooling in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkern.ops._conv.checks import check_pooled
from fedkern.ops._conv.dispatch import check_forced, choose_kernels
from fedkern.ops._conv.kernels import NotFinite, Pooling, PoolKernels
from fedkern.ops._conv.reference import conv_pool_reference
from fedkern.ops._core import backend, library
from fedkern.ops._core.backend import is_readable
from fedkern.ops._core.checks import python_number
from fedkern.ops._core.function import Context, EagerFunction, saved_tensors

_grad_enabled = torch.is_grad_enabled
_CHANNELS_LAST = torch.channels_last


def conv_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int = 0, relu: bool = True) -> Tensor:
    """Compute convolution, bias, ReLU and max pooling: a stage of a convolutional network without norm in one call.

    The same in PyTorch::

        y = F.conv2d(x, weight, bias, padding=padding)
        y = y.relu() if relu else y
        y = F.max_pool2d(y, 2)

    The CPU kernel computes fp32 maps, contiguous or channels-last, of sizes at which it is faster than PyTorch. Its
    backward pass leaves out the products that pooling and ReLU make zero: three quarters and more. PyTorch's
    operators compute all other calls, such as under autocast, ``torch.compile`` and torch.func transforms, on GPUs,
    and at the portable ISA level.

    Args:
        x: maps ``[B, in, H, W]``; fp32, fp64, bf16 or fp16, any strides.
        weight: ``[out, in, 3, 3]`` or ``[out, in, 5, 5]``, of x's dtype.
        bias: ``[out]``, of x's dtype; None: no bias.
        padding: zeros around the maps: 0, or half of the kernel's side, rounded down.
        relu: whether a ReLU follows.

    Returns:
        ``[B, out, h // 2, w // 2]``, where the convolution gives ``[B, out, h, w]``: an odd last row and column are
        left out. Channels-last where x or weight is, as in PyTorch.

    Differentiable in x, weight and bias; retained graphs and second derivatives work as usual. What the kernel
    computes has the same bits every time, for any number of threads. Where two values of a window differ by rounding
    alone, another of them may be the maximum than in PyTorch.

    Where x, the weight or the gradient holds an infinity or NaN, or a product of Winograd's overflows, PyTorch's
    operators compute the call again, since 0 times an infinity is NaN.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong.
        RuntimeError: a forced backend does not support the call.
    """
    padding = python_number(padding)
    kernel = choose_pool_kernels(x, weight, bias, padding)
    if kernel is None or not isinstance(relu, bool):
        check_pooled(x, weight, bias, padding, relu)
        check_forced("conv_pool", x, weight, bias)
        return conv_pool_reference(x, weight, bias, padding=padding, relu=relu)
    last = any(tensor.stride(1) == 1 and tensor.is_contiguous(memory_format=_CHANNELS_LAST) for tensor in (x, weight))
    return run_pooling(kernel, x, weight, bias, Pooling(padding, relu, not last or len(weight) == 1))


def choose_pool_kernels(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> PoolKernels | None:
    """Return the kernel of a call for :func:`run_pooling`, or None, and never raise."""
    return choose_kernels("conv_pool", x, weight, bias, padding)


def run_pooling(kernel: PoolKernels, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Pooling) -> Tensor:
    try:
        if _grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
            result: Tensor = _ConvPool.call(kernel, settings, x, weight, bias)
            return result
        return kernel.forward(x, weight, bias, settings)[0]
    except NotFinite:
        return conv_pool_reference(x, weight, bias, padding=settings.padding, relu=settings.relu)


class _ConvPool(EagerFunction):
    @staticmethod
    def forward(
        ctx: Context, kernel: PoolKernels, settings: Pooling, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        out, places = kernel.forward(x, weight, bias, settings)
        ctx.save_for_backward(x, weight, bias, places)
        ctx.settings = kernel, settings
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel, settings = ctx.settings
        x, weight, bias, places = saved_tensors(ctx)
        needs = ctx.needs_input_grad[2:]
        if is_readable(grad):
            try:
                return (None, None, *kernel.backward(grad, x, weight, places, settings, needs))
            except NotFinite:
                pass

        # Recorded (create_graph=True), batched (is_grads_batched=True) or not finite.
        def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return conv_pool_reference(x, weight, bias, padding=settings.padding, relu=settings.relu)

        with torch.autocast("cpu", enabled=False):
            gradients = library.differentiate_reference(reference, (x, weight, bias), needs, grad, _grad_enabled())
        return (None, None, *gradients)


backend.add_kernels("conv_pool", cpu=PoolKernels, dtypes=frozenset({torch.float32}), fits="pool_fits")
