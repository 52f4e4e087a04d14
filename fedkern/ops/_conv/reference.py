"""References of conv_norm and conv_pool in plain PyTorch: specification, test oracle and fallback."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern.ops._conv.kernels import Inputs, Settings
from fedkern.ops._core.layout import apply_norm, conv2d, group_normed


def conv_norm_reference(inputs: Inputs, settings: Settings) -> Tensor:
    """Specify :func:`fedkern.ops.conv_norm`."""
    x, weight, _, _, bias, _ = inputs
    y = conv2d(x, weight, bias, (settings.stride,) * 2, (weight.shape[2] // 2,) * 2, (1, 1), 1)
    return norm_reference(y, inputs, settings)


def norm_reference(y: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Specify the steps of :func:`fedkern.ops.conv_norm` after the convolution."""
    _, _, scale, shift, _, residual = inputs
    mean, variance, momentum, eps, _, relu, pool, update, training, groups = settings
    if training and not update:
        mean = variance = None
    if mean is not None and variance is not None and not training:
        mean, variance = mean.contiguous(), variance.contiguous()
    # Contiguous: PyTorch's gradient of channels-last maps reads other memory where these vectors have strides (2.13).
    if groups:
        y = group_normed(y, groups, scale, shift, eps)
    else:
        y = apply_norm(F.batch_norm, y, mean, variance, scale.contiguous(), shift, training, momentum, eps)
    if residual is not None:
        y = y + residual
    if relu:
        y = torch.relu(y)
    return F.max_pool2d(y, pool) if pool > 1 else y


def conv_pool_reference(x: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int, relu: bool) -> Tensor:
    """Specify :func:`fedkern.ops.conv_pool`."""
    y = conv2d(x, weight, bias, (1, 1), (padding, padding), (1, 1), 1)
    return F.max_pool2d(torch.relu(y) if relu else y, 2)
