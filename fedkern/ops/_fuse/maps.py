"""fuse: feature maps in memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def order_of(feature: Tensor) -> int:
    """Return a map's order in memory: 1 if channels are adjacent, -1 if positions are or neither, 0 if both."""
    shape, strides = feature.shape, feature.stride()
    channels = shape[1]
    if channels == 1 or math.prod(shape[2:]) == 1:
        return 0
    if strides[1] != 1 or strides[-1] < channels:
        return -1
    return 1 if position_stride(shape, strides) is not None else -1


def position_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the one stride through all positions ``*S`` of a map, or None."""
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
    """Return whether the result is channels-last: every map fits, and at least one fits nothing else."""
    for feature in features:
        if not feature.is_contiguous():
            break
    else:
        return False
    shape, strides = features[0].shape, features[0].stride()
    highest = order_of(features[0])
    for feature in features:
        if highest < 0:
            return False
        if feature.stride() != strides or feature.shape != shape:
            order = order_of(feature)
            highest = order if order < 0 else max(highest, order)
    return highest == 1


def empty_map(shape: Sequence[int], channels_last: bool, like: Tensor) -> Tensor:
    if not channels_last:
        return like.new_empty(shape)
    if len(shape) == 4:
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return torch.empty((shape[0], *shape[2:], shape[1]), dtype=like.dtype, device=like.device).movedim(-1, 1)
