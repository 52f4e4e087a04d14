"""fuse: interface of the kernels, and the memory layout of feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class FuseNeeds(NamedTuple):
    """Which gradients are wanted."""

    features: tuple[bool, ...]
    scale: bool
    shift: bool


class FuseGradients(NamedTuple):
    """Gradients of the maps (None where not wanted), scale and shift ``[sum of C_m]``."""

    features: list[Tensor | None]
    scale: Tensor | None
    shift: Tensor | None


class FuseKernel(Protocol):
    """A backend's ``fuse_concat`` and ``fuse_mean``; arguments are checked, tensors strided and not negated.

    Maps have shape ``[B, C_m, *S]``, one dtype and any strides; ``scale`` and ``shift`` have shape ``[sum of C_m]`` and
    any of the four dtypes.  Products and sums are taken in fp32 (fp64 for fp64 maps) and rounded once.
    """

    def forward(
        self, features: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, relu: bool, mean: bool
    ) -> Tensor:
        """``act(scale * f_m + shift)``, concatenated along the channels or (``mean``) averaged over the maps.

        The result is dense, and channels-last where :func:`wants_channels_last` says so.
        """

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
        """The gradients that ``needs`` asks for, the same bits every time.

        Args:
            grad: gradient of the result, of any strides (0 included).
            features: the maps, if scale's gradient or the gradient of a mean of ReLUs is wanted; else None.
            out: the result of a concatenation with ReLU, if ``features`` is None; the gradient passes where it is
                positive.
            channels: C_m of every map.
            channels_last: layout of the maps' gradients, which are dense.
        """


def order_of(feature: Tensor) -> int:
    """Order of ``[B, C, *S]`` in memory: 1 if channels are adjacent (channels-last), -1 if positions are, 0 for both.

    A map in neither order counts as -1: it will be copied.
    """
    shape, strides = feature.shape, feature.stride()
    channels = shape[1]
    if channels == 1 or math.prod(shape[2:]) == 1:
        return 0
    if strides[1] != 1 or strides[-1] < channels:
        return -1
    return 1 if position_stride(shape, strides) is not None else -1


def position_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride that leads through all positions ``*S`` of a map, or None."""
    step = None
    size = 1
    for axis in range(len(shape) - 1, 1, -1):
        if shape[axis] == 1:
            continue
        if step is None:
            step = strides[axis]
        elif strides[axis] != step * size:
            return None
        size *= shape[axis]
    return 1 if step is None else step


def wants_channels_last(features: Sequence[Tensor]) -> bool:
    """True if the result is channels-last: every map fits that order, and at least one map fits no other."""
    for feature in features:
        if not feature.is_contiguous():
            break
    else:
        return False
    shape, strides = features[0].shape, features[0].stride()
    found = order_of(features[0])
    for feature in features:
        if found < 0:
            return False
        if feature.stride() != strides or feature.shape != shape:
            order = order_of(feature)
            found = order if order < 0 else max(found, order)
    return found == 1


def empty_map(shape: Sequence[int], channels_last: bool, like: Tensor) -> Tensor:
    """An empty dense map ``[B, C, *S]`` with the dtype and device of ``like``."""
    if not channels_last:
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    if len(shape) == 4:
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return torch.empty((shape[0], *shape[2:], shape[1]), dtype=like.dtype, device=like.device).movedim(-1, 1)


def fused_channels(channels: Sequence[int], mean: bool) -> int:
    """Channels of the result."""
    return channels[0] if mean else sum(channels)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The computing dtype of products and sums of maps of ``dtype``."""
    return torch.float64 if dtype is torch.float64 else torch.float32
