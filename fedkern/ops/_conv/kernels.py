"""conv_norm and conv_pool: the launchers of the CPU core."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fedkern.ops._core.launch import Launcher
from fedkern.ops._core.memory import HUGE

_empty_like = torch.empty_like
_CHANNELS_LAST = torch.channels_last
_FULL = 16  # such channels are never filled up
_LARGE = HUGE // 4  # elements of float32; fresh() compares bytes

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None


class Settings(NamedTuple):
    """Settings of a call of conv_norm, and the running statistics."""

    mean: Tensor | None = None
    variance: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5
    stride: int = 1
    relu: bool = True
    pool: int = 1
    update: bool = True
    training: bool = True
    groups: int = 0


class Pooling(NamedTuple):
    """Settings of a call of conv_pool (``dense``: the result is contiguous, else channels-last)."""

    padding: int
    relu: bool
    dense: bool


# What a backward pass reads: y, the convolution's result; raw, those of y that the maxima come from, laid out as the
# result (None without pooling); saved, fp32 [4, out]: mean, 1 / deviation, and a and b of the norm a y + b; of a group
# norm [batch, 5, out], see conv.h. All have the channels of ``conv_channels``: as many as the kernel computes, which
# may be more than the result has.
Kept = tuple[Tensor | None, Tensor | None, Tensor]


class NotFinite(Exception):
    """An infinity or NaN, which the kernel spreads further than a convolution does."""


class ConvKernels(Launcher):
    """conv_norm of ``fedkern._cpu``, on channels-last maps that ``conv_fits`` accepts."""

    def __init__(self, core: ModuleType) -> None:
        super().__init__(core)
        self._forward, self._backward, self._channels = core.conv_forward, core.conv_backward, core.conv_channels

    def forward(self, inputs: Inputs, settings: Settings, keep: bool) -> tuple[Tensor, Kept]:
        """Return the result and what the backward pass reads, and update the running statistics.

        Without ``keep`` the backward pass gets the last tensor only.

        Raises:
            NotFinite: nothing is written then.
        """
        x, weight, scale, shift, bias, residual = inputs
        mean, variance, momentum, eps, stride, relu, pool, update, training, groups = settings
        bias = bias if groups else None  # batch statistics take it out again
        update = update and mean is not None
        batch, _, height, width = x.shape
        height, width, channels = -(-height // stride), -(-width // stride), weight.shape[0]
        high, wide = height // pool, width // pool
        out = x.new_empty_strided((batch, channels, high, wide), (high * wide * channels, 1, wide * channels, channels))
        y = raw = None
        if channels % _FULL:
            channels = self._channels(x, weight, stride)
        count = batch * height * width * channels
        if keep:
            y = x.new_empty(count)
            raw = x.new_empty(batch * high * wide * channels) if pool > 1 else None
        if count >= _LARGE:
            for large in (out, y, raw):
                if large is not None:
                    self.fresh(large)
        saved = x.new_empty((batch, 5, channels) if groups else (4, channels))
        if not self._forward(
            x, weight, scale, shift, bias, mean, variance, residual, out, y, raw, saved, momentum, eps, stride, relu,
            pool, update, training, groups, self.at(x),
        ):  # fmt: skip
            raise NotFinite
        return out, (y, raw, saved)

    def backward(
        self,
        settings: Settings,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        intermediates: Kept,
        out: Tensor | None,
        needs: Sequence[bool],
    ) -> Gradients:
        """Return the gradients of the :class:`Inputs` that ``needs`` asks for, in their layouts.

        ``out`` is the result where a residual was added before the ReLU, else None.

        Raises:
            NotFinite: there are no gradients then.
        """
        stride, relu, pool, training = settings.stride, settings.relu, settings.pool, settings.training
        y, raw, saved = intermediates
        need_x, need_weight, need_scale, need_shift, need_bias, need_residual = needs
        dense = grad
        if not grad.is_contiguous(memory_format=_CHANNELS_LAST) or grad.is_neg():
            dense = grad.resolve_neg().contiguous(memory_format=_CHANNELS_LAST)
        to_x = _empty_like(x) if need_x else None
        to_weight = _empty_like(weight) if need_weight else None
        to_scale = _empty_like(scale) if need_scale else None
        to_shift = _empty_like(scale) if need_shift else None
        to_bias = None
        if need_bias:
            to_bias = _empty_like(scale) if settings.groups else torch.zeros_like(scale)
        to_residual = _empty_like(dense) if need_residual and relu else None
        if to_x is not None and x.numel() >= _LARGE:
            self.fresh(to_x)
        if not self._backward(
            dense, x, weight, y, raw, saved, out, to_x, to_weight, to_scale, to_shift, to_bias, to_residual, stride,
            relu, pool, training, settings.groups, self.at(x),
        ):  # fmt: skip
            raise NotFinite
        return to_x, to_weight, to_scale, to_shift, to_bias, to_residual if relu or not need_residual else grad


class PoolKernels(Launcher):
    """conv_pool of ``fedkern._cpu``, on contiguous or channels-last maps that ``pool_fits`` accepts."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, pooling: Pooling) -> tuple[Tensor, Tensor]:
        """Return the result, and the positions of the maxima.

        Raises:
            NotFinite: an infinity or NaN, whose products with zeros the backward pass would leave out.
        """
        padding, relu, dense = pooling
        batch, channels = len(x), len(weight)
        high, wide = ((side + 2 * padding - weight.shape[2] + 1) // 2 for side in x.shape[2:])
        layout = torch.contiguous_format if dense else _CHANNELS_LAST
        out = torch.empty((batch, channels, high, wide), memory_format=layout, dtype=x.dtype, device="cpu")
        chosen = torch.empty((batch, high * wide, -(-channels // 8) * 8), dtype=torch.uint8, device="cpu")
        if not self.core.pool_forward(x, weight, bias, out, chosen, padding, relu, self.at(x)):
            raise NotFinite
        return out, chosen

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, chosen: Tensor, pooling: Pooling, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        padding, relu, dense = pooling
        grad = grad.resolve_neg().contiguous(memory_format=torch.contiguous_format if dense else _CHANNELS_LAST)
        x, weight = (
            tensor if tensor.is_contiguous() else tensor.contiguous(memory_format=_CHANNELS_LAST)
            for tensor in (x, weight)
        )  # hooks on saved tensors may have changed strides
        to_x = _empty_like(x) if needs[0] else None
        to_weight = _empty_like(weight) if needs[1] else None
        to_bias = x.new_empty(len(weight)) if needs[2] else None
        if not self.core.pool_backward(
            grad, x, weight, chosen.contiguous(), to_x, to_weight, to_bias, padding, relu, self.at(x)
        ):
            raise NotFinite
        return to_x, to_weight, to_bias
