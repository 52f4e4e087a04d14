"""FusedBlocks on the CPU: M branches' convolutions by the compiled core's direct algorithm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core import backend
from fedkern.ops._fuse.blocks.folded import Folded
from fedkern.ops._fuse.blocks.layers import FusedConv
from fedkern.ops._fuse.kernels import FuseKernels

# kFuseConvColumns of csrc/include/fedkern/fuse.h: a map's width with its border; wider maps take another lowering.
MAX_COLUMNS = 256


def core_for(x: Tensor) -> Any | None:
    """The compiled core if it can convolve ``x``, else None: ``x`` must be a plain fp32 CPU tensor, seen eagerly."""
    if x.dtype is not torch.float32 or x.device.type != "cpu" or not backend.eager(x) or x.is_neg():
        return None
    kernel = backend.select("fuse_concat", x)
    return kernel.core if isinstance(kernel, FuseKernels) and not kernel.gpu else None


def fits(conv: FusedConv, columns: int) -> bool:
    """Whether the direct algorithm covers this convolution with a result ``columns`` wide.

    It covers one group, the same stride and dilation on both axes, and padding given as numbers.
    """
    return (
        conv.groups == 1
        and math.prod(conv.shape) > 0
        and not isinstance(conv.padding, str)
        and conv.stride[0] == conv.stride[1]
        and conv.dilation[0] == conv.dilation[1]
        and columns + (int(conv.kernel[1]) - 1) * conv.dilation[1] // conv.stride[1] <= MAX_COLUMNS
    )


def convolve(
    core: Any, layer: Folded, x: Tensor, shared: bool, other: Tensor | None, other_shared: bool, relu: bool, out: Tensor
) -> None:
    """``out = relu(conv(x) + bias + other)`` for all branches.

    The core checks nothing, so the caller must make sure that ``x`` and ``out`` are fp32 on the CPU and contiguous
    within a sample, that ``x`` has the channels that the weights read (``shapes.survey``), and that ``layer.plain`` is
    true.
    """
    conv, branches = layer.conv, layer.conv.branches
    packed = layer.packed(core.fuse_conv_block())
    late = None
    if other is not None:
        other = other.contiguous()
        channels = out.shape[1] // branches if other_shared else out.shape[1]
        if other.shape[1:] != (channels, *out.shape[2:]) or other.dtype is not torch.float32:
            late, other = other, None  # broadcast over positions: rare, so left to torch
    kernel = (*conv.kernel, conv.stride[0], conv.dilation[0], *conv.padding)
    plain_relu = relu and late is None
    core.fuse_conv(
        x, packed, layer.bias, other, out, branches, shared, other_shared, kernel, plain_relu, torch.get_num_threads()
    )
    if late is not None:
        out += late.repeat(1, branches, 1, 1) if other_shared else late
        if relu:
            out.relu_()
