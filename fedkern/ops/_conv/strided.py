"""strided_conv: the grouped 4x4 convolution of patch discriminators, an operator for fedkern's own networks."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern.ops._conv.checks import choose_kernels
from fedkern.ops._conv.kernels import NotFinite
from fedkern.ops._core import backend, library
from fedkern.ops._core.launch import Launcher
from fedkern.ops._core.library import Context, EagerFunction, saved_tensors

_CHANNELS_LAST = torch.channels_last


def strided_conv(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Compute ``F.conv2d(x, weight, stride=2, padding=1, groups=groups)``.

    The CPU kernel computes dense fp32 maps of two groups or more, of sizes at which it is faster than PyTorch. PyTorch
    computes all other calls, all second derivatives, and calls that meet an infinity or NaN.

    Args:
        x: maps ``[B, groups * in, H, W]``.
        weight: ``[groups * out, in, 4, 4]``, of x's dtype.
        groups: number of convolutions side by side.

    Returns:
        ``[B, groups * out, H // 2, W // 2]``. What the kernel computes is channels-last, and has the same bits for any
        number of threads.
    """
    kernel: StridedKernels | None = choose_kernels("strided_conv", x, weight, groups)
    if kernel is None:
        return strided_reference(x, weight, groups)
    x = x.contiguous(memory_format=_CHANNELS_LAST)
    try:
        return _StridedConv.call(kernel, groups, x, weight)
    except NotFinite:
        return strided_reference(x, weight, groups)


def strided_reference(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Specify :func:`strided_conv`."""
    return F.conv2d(x, weight, stride=2, padding=1, groups=groups)


class StridedKernels(Launcher):
    """strided_conv of ``fedkern._cpu``, on maps that ``strided_fits`` accepts."""

    def forward(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        batch, _, height, width = x.shape
        y = torch.empty(
            (batch, len(weight), height // 2, width // 2), dtype=x.dtype, device="cpu", memory_format=_CHANNELS_LAST
        )
        if not self.core.strided_forward(x, weight, y, groups, self.at(x)):
            raise NotFinite
        return y

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, groups: int, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        grad = grad.resolve_neg().contiguous(memory_format=_CHANNELS_LAST)
        x, weight = x.contiguous(memory_format=_CHANNELS_LAST), weight.contiguous()  # hooks may have changed strides
        to_x, to_weight = torch.empty_like(x) if need_x else None, torch.empty_like(weight) if need_weight else None
        if not self.core.strided_backward(grad, x, weight, to_x, to_weight, groups, self.at(x)):
            raise NotFinite
        return to_x, to_weight


class _StridedConv(EagerFunction):
    @staticmethod
    def forward(ctx: Context, kernel: StridedKernels, groups: int, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = kernel, groups
        return kernel.forward(x, weight, groups)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel, groups = ctx.settings
        x, weight = saved_tensors(ctx)
        needs = ctx.needs_input_grad[2:]
        if backend.is_readable(grad):
            try:
                return (None, None, *kernel.backward(grad, x, weight, groups, *needs))
            except NotFinite:
                pass
        # Recorded (create_graph=True), batched (is_grads_batched=True) or not finite.
        reference = functools.partial(strided_reference, groups=groups)
        with torch.autocast("cpu", enabled=False):
            gradients = library.differentiate_reference(reference, (x, weight), needs, grad, torch.is_grad_enabled())
        return (None, None, *gradients)


backend.add_kernels("strided_conv", cpu=StridedKernels, dtypes=frozenset({torch.float32}), fits="strided_fits")
