"""fuse_concat and fuse_mean on CUDA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core import backend
from fedkern.ops._core.backend import DTYPES, address
from fedkern.ops._core.cuda import queue
from fedkern.ops._fuse.kernels import (
    FuseGradients,
    FuseNeeds,
    compute_dtype,
    empty_map,
    fused_channels,
    order_of,
    position_stride,
    wants_channels_last,
)
from fedkern.ops._fuse.reference import fuse_backward_reference, fuse_mean_reference

_Map = tuple[int | None, int, int, int, int]
_ABSENT: _Map = (None, 0, 0, 0, 0)


class CudaFuse:
    """:class:`fedkern.ops._fuse.kernels.FuseKernel` on ``fedkern._cuda``.

    Maps are copied first if no single stride leads through their positions.  A mean of more than 48 maps is left to
    plain PyTorch.
    """

    def __init__(self, core: Any) -> None:
        self.core = core

    def forward(
        self, features: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, relu: bool, mean: bool
    ) -> Tensor:
        first = features[0]
        shape = first.shape
        channels = [x.shape[1] for x in features]
        channels_last = wants_channels_last(features)
        out = empty_map((shape[0], fused_channels(channels, mean), *shape[2:]), channels_last, first)
        if mean and len(features) > self.core.fuse_maps:
            backend.not_forced("fuse_mean", "cuda", f"of {len(features)} maps")
            return out.copy_(fuse_mean_reference(features, scale, shift, relu))
        held = [_placed(x) for x in features]
        factor, summand = _vector(scale, first), _vector(shift, first)
        self.core.fuse_forward(
            (DTYPES[first.dtype], shape[0], math.prod(shape[2:]), relu, mean),
            channels,
            [_map(x) for x in held],
            address(factor, "scale"),
            address(summand, "shift"),
            _map(out),
            *queue(first),
        )
        return out

    def backward(
        self,
        grad: Tensor,
        features: Sequence[Tensor] | None,
        out: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        relu: bool,
        mean: bool,
        channels: Sequence[int],
        needs: FuseNeeds,
        channels_last: bool,
    ) -> FuseGradients:
        batch, positions, total = grad.shape[0], grad.shape[2:], sum(channels)
        targets = [
            empty_map((batch, count, *positions), channels_last, grad) if need else None
            for count, need in zip(channels, needs.features, strict=True)
        ]
        if mean and len(channels) > self.core.fuse_maps:
            backend.not_forced("fuse_mean", "cuda", f"of {len(channels)} maps")
            plain = fuse_backward_reference(grad, features, out, scale, shift, relu, mean, channels, needs)
            maps = [
                to if to is None or given is None else to.copy_(given)
                for to, given in zip(targets, plain.features, strict=True)
            ]
            return FuseGradients(maps, plain.scale, plain.shift)
        by_scale = grad.new_empty(total, dtype=torch.float64) if needs.scale else None
        by_shift = grad.new_empty(total, dtype=torch.float64) if needs.shift else None
        partial = None
        if needs.scale or needs.shift:
            partial = grad.new_empty(2 * self.core.fuse_splits * total, dtype=torch.float64)
        held = [] if features is None else [_placed(x) for x in features]
        given, result = _placed(grad.resolve_neg()), None if out is None or features else _placed(out)
        factor, summand = _vector(scale, grad), _vector(shift, grad)
        self.core.fuse_backward(
            (DTYPES[grad.dtype], batch, math.prod(positions), relu, mean),
            list(channels),
            [_map(x) for x in held],
            address(factor, "scale"),
            address(summand, "shift"),
            _ABSENT if result is None else _map(result),
            _map(given),
            [_ABSENT if x is None else _map(x) for x in targets] if any(needs.features) else [],
            address(by_scale),
            address(by_shift),
            address(partial),
            *queue(grad),
        )
        to_scale = None if by_scale is None or scale is None else by_scale.to(scale.dtype)
        to_shift = None if by_shift is None or shift is None else by_shift.to(shift.dtype)
        return FuseGradients(targets, to_scale, to_shift)


def _vector(vector: Tensor | None, like: Tensor) -> Tensor | None:
    """``scale`` or ``shift`` as the core takes it: contiguous, in the computing dtype."""
    return None if vector is None else vector.to(compute_dtype(like.dtype)).contiguous()


def _placed(x: Tensor) -> Tensor:
    """``x``, copied if no single stride leads through its positions."""
    if position_stride(x.shape, x.stride()) is not None:
        return x
    return empty_map(x.shape, order_of(x) == 1, x).copy_(x)


def _map(x: Tensor) -> _Map:
    """Address, channels, and the strides of batch, channel and position."""
    strides = x.stride()
    return (address(x, "a feature map"), x.shape[1], strides[0], strides[1], position_stride(x.shape, strides) or 0)
