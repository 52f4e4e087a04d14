"""References of conv_norm and conv_pool in plain PyTorch: the specification, the tests' oracle and the fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern.ops._core.layout import conv2d, group_normed, normed


def conv_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int = 1,
    relu: bool = True,
    pool: int = 1,
    residual: Tensor | None = None,
    update: bool = True,
    training: bool = True,
    groups: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """The specification of :func:`fedkern.ops.conv_norm`; without ``weight``, x is the convolution's result."""
    if weight is not None:
        y = conv2d(x, weight, bias, (stride, stride), (weight.shape[2] // 2,) * 2, (1, 1), 1)
    else:
        y = x if bias is None else x + bias[:, None, None]
    if training and not update:
        mean = variance = None
    if mean is not None and variance is not None and not training:
        mean, variance = mean.contiguous(), variance.contiguous()
    # Contiguous: PyTorch's gradient of channels-last maps reads other memory where these vectors have strides (2.13).
    if groups:
        y = group_normed(y, groups, scale, shift, eps)
    else:
        y = normed(F.batch_norm, y, mean, variance, scale.contiguous(), shift, training, momentum, eps)
    if residual is not None:
        y = y + residual
    if relu:
        y = torch.relu(y)
    return F.max_pool2d(y, pool) if pool > 1 else y


def conv_pool_reference(x: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int, relu: bool) -> Tensor:
    """The specification of :func:`fedkern.ops.conv_pool`."""
    y = conv2d(x, weight, bias, (1, 1), (padding, padding), (1, 1), 1)
    return F.max_pool2d(torch.relu(y) if relu else y, 2)
