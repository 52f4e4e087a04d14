"""Strides of maps, by which torch chooses the kernels of its layers and reads gradients."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.ops._core.private_torch import functorch_active

NARROW = 16
"""Input channels from which the gradient of a strided 1x1 convolution is safe. With fewer, oneDNN's (torch 2.13, 2.14)
writes past its memory where maps are channels-last."""


def dense_stride(x: Tensor) -> tuple[int, ...]:
    """Return the tensor's strides, or a dense copy's if there are gaps or overlaps."""
    return torch.empty_like(x, device="meta", memory_format=torch.preserve_format).stride()


def plain_strides(x: Tensor) -> Tensor:
    """Return ``x`` with a new tensor's strides, also along axes of size 1, where ``contiguous()`` keeps others."""
    return x.contiguous().flatten().view(x.shape)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """Compute ``F.conv2d``, with settings in pairs and a gradient that is safe for all widths (``NARROW``)."""
    narrow = weight.shape[1] < NARROW and weight.shape[2:].numel() == 1 and groups == 1
    if narrow and max(stride) > 1 and padding in ((0, 0), "valid"):
        x, stride = x[..., :: stride[0], :: stride[1]], 1
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


class SafeConv2d(nn.Conv2d):
    """``nn.Conv2d`` that calls :func:`conv2d`, for layers that are padded with zeros."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def apply_norm(norm: Callable[..., Tensor], x: Tensor, *settings: Any, **named: Any) -> Tensor:
    """Call a batch norm of PyTorch's, with the gradient in the layout of the map.

    PyTorch 2.13 reads the gradient of a batch of one, or of maps of one row or column, by the strides of axes of size
    1, which say nothing about the layout.
    """
    if isinstance(x, Tensor) and x.dim() == 4 and not torch.jit.is_tracing():
        batch, _, height, width = x.shape
        if 1 in (batch, height, width) and height * width != 1 and torch.is_grad_enabled():
            return _laid_out(norm(_laid_out(x), *settings, **named))
    return norm(x, *settings, **named)


def group_normed(x: Tensor, groups: int, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Compute ``F.group_norm``, on contiguous maps where autograd or a transform sees it.

    Channels-last maps have no vmap in PyTorch 2.13, and where only scale and shift want a gradient it ends the process.
    """
    transformed = not torch.compiler.is_compiling() and functorch_active()
    if not transformed and not torch.is_grad_enabled():
        return F.group_norm(x, groups, scale, shift, eps)
    y = F.group_norm(plain_strides(x), groups, scale, shift, eps)
    return y if transformed or x.is_contiguous() else y.contiguous(memory_format=torch.channels_last)


def _laid_out(x: Tensor) -> Tensor:
    """Return ``x`` as a view whose strides name its layout."""
    if x.stride(1) != 1:
        return plain_strides(x)
    return plain_strides(x.movedim(1, -1)).movedim(-1, 1)
