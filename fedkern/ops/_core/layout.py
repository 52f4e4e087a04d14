"""Strides of maps, by which torch chooses the kernels of its layers."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

NARROW = 16
"""Input channels from which the gradient of a strided 1x1 convolution is safe.  With fewer, oneDNN's (torch 2.13, 2.14)
writes past its memory where maps are channels-last."""


def plain_strides(x: Tensor) -> Tensor:
    """``x`` with the strides of a new tensor; ``contiguous()`` leaves other ones along axes of size 1."""
    return x.contiguous().flatten().view(x.shape)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """``F.conv2d``, whose settings are pairs here, with a gradient that is safe for every width (``NARROW``)."""
    narrow = weight.shape[1] < NARROW and weight.shape[2:].numel() == 1 and groups == 1
    if narrow and max(stride) > 1 and padding in ((0, 0), "valid"):
        x, stride = x[..., :: stride[0], :: stride[1]], 1
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
