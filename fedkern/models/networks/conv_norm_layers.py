"""Convolution, batch or group norm, ReLU and max pooling of networks as one operator, :func:`fedkern.ops.conv_norm`.

PyTorch's layers keep their names, states and hooks.  The operator replaces them if calling them has no other effect.
"""

from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.acceleration.layers import GLOBAL_HOOKS, PARAMETERS, convolution, has_hooks
from fedkern.ops._conv.conv_norm import choose_norm_kernels, compute_conv_norm
from fedkern.ops._conv.kernels import Inputs, Settings
from fedkern.ops._core.layout import apply_norm
from fedkern.ops._core.private_torch import functorch_active

_POOL = attrgetter("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
_SERVED_POOL = (2, 2, 0, 1, False, False)
_NORMS = (nn.BatchNorm2d, nn.GroupNorm)
_BUFFERS = itemgetter("running_mean", "running_var", "num_batches_tracked")


def run_conv_norm(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module,
    relu: nn.ReLU | Callable[[Tensor], Tensor] | None = None,
    pool: nn.Module | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute ``pool(relu(norm(conv(x)) + residual))``, by the operator if it supports the layers and no hook watches.

    ``relu`` is a module, ``F.relu``, or None.
    """
    served = None if torch.compiler.is_compiling() else _run_operator(x, conv, norm, relu, pool, residual)
    if served is not None:
        return served
    y = apply_norm(norm, conv(x))
    if residual is not None:
        y = y + residual
    if relu is not None:
        y = relu(y)
    return y if pool is None else pool(y)


def _run_operator(
    x: Tensor, conv: nn.Module, norm: nn.Module, relu: object, pool: nn.Module | None, residual: Tensor | None
) -> Tensor | None:
    """Return the operator's result, or None if the layers have to run."""
    called: list[nn.Module] = [conv, norm]
    if relu is not None and relu is not F.relu:
        if type(relu) is not nn.ReLU:
            return None
        called.append(relu)
    if pool is not None:
        if type(pool) is not nn.MaxPool2d or _POOL(pool) != _SERVED_POOL:
            return None
        called.append(pool)
    parts = convolution(conv)
    if parts is None:
        return None
    for layer in called:
        if has_hooks(layer) or not layer.__dict__.keys().isdisjoint(("forward", "_conv_forward")):
            return None
    weight, bias, side, stride, padding = parts
    try:
        scale, shift = PARAMETERS(norm._parameters)
        if type(norm) is nn.BatchNorm2d:
            mean, variance, count = _BUFFERS(norm._buffers)
            training, momentum, eps, groups = norm.training, norm.momentum, norm.eps, 0
            tracks = training and norm.track_running_stats
        elif type(norm) is nn.GroupNorm:
            mean = variance = count = None
            training, tracks, momentum, eps, groups = True, False, 0.0, norm.eps, norm.num_groups
        else:
            return None
    except KeyError:  # no parameter or buffer, but another object
        return None
    if training and not tracks:
        mean = variance = None
    size = 1 if pool is None else 2
    if padding != side // 2 or bias is not None or eps <= 0 or any(GLOBAL_HOOKS):  # batch norm refuses such an eps
        return None
    batch = training or (mean is None and variance is None)
    inputs = Inputs(x, weight, scale, shift, None, residual)
    settings = Settings(mean, variance, momentum or 0.0, eps, stride, relu is not None, size, tracks, batch, groups)
    kernel = choose_norm_kernels(inputs, settings)
    if kernel is None:
        return None
    if tracks and count is not None:
        count.add_(1)
        if momentum is None:  # the cumulative average
            settings = settings._replace(momentum=1 / float(count))
    return compute_conv_norm(kernel, inputs, settings)


class NormSequential(nn.Sequential):
    """``nn.Sequential`` with the correct gradient of batch norms (`fedkern.ops._core.layout.apply_norm`)."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = apply_norm(layer, x) if isinstance(layer, nn.BatchNorm2d) else layer(x)
        return x


class ConvSequential(nn.Sequential):
    """``nn.Sequential`` with :func:`run_conv_norm` for its convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        layers: list[Any] = [*self, None, None, None]
        at = 0
        while (layer := layers[at]) is not None:
            norm, relu, pool = layers[at + 1 : at + 4]
            at += 1
            if type(layer) is not nn.Conv2d or type(norm) not in _NORMS:
                x = apply_norm(layer, x) if isinstance(layer, nn.BatchNorm2d) else layer(x)
                continue
            if type(relu) is not nn.ReLU:
                relu, pool = None, relu
            if type(pool) is not nn.MaxPool2d:
                pool = None
            at += 1 + (relu is not None) + (pool is not None)
            x = run_conv_norm(x, layer, norm, relu, pool)
        return x


class ConvNorm(nn.Module):
    """3x3 convolution, batch norm, ReLU and max pooling, ``pool(relu(norm(conv(x)) + residual))``.

    On the CPU in fp32 :func:`fedkern.ops.conv_norm` computes all of them at once, forward and backward.  The layers run
    one by one under autocast, ``torch.compile`` and transforms of ``torch.func``, with hooks on a layer, and if a layer
    was replaced by one of another type.

    Attributes:
        conv: 3x3 convolution of stride 1 and padding 1, without bias.
        norm: batch norm.
        relu, pool: ReLU and max pooling, or None.

    Args:
        channels_in, channels_out: channels of the input and of the result.
        relu: whether to add a ReLU.
        pool: side of the pooling's windows, 1 for no pooling.  The operator supports 1 and 2.
    """

    def __init__(self, channels_in: int, channels_out: int, *, relu: bool = True, pool: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU() if relu else None
        self.pool = nn.MaxPool2d(pool) if pool > 1 else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map ``[B, channels_in, H, W]`` to ``[B, channels_out, H // pool, W // pool]``, channels-last.

        Args:
            residual: ``[B, channels_out, H, W]``, added before the ReLU.
        """
        if type(x) is Tensor and not functorch_active():  # vmap knows no memory formats
            x = x.contiguous(memory_format=torch.channels_last)
        return run_conv_norm(x, self.conv, self.norm, self.relu, self.pool, residual)
