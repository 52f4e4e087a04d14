"""fuse: plain PyTorch references of the operators and their gradients."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedkern.ops._core.backend import compute_dtype


class FuseCall(NamedTuple):
    """Arguments of fuse_concat or (``mean``) fuse_mean, without the maps ``[B, C_m, *S]``.

    Attributes:
        scale, shift: ``[sum of C_m]``, of any of the four dtypes.
        channels: the C_m.
        channels_last: layout of the result.
    """

    scale: Tensor | None
    shift: Tensor | None
    relu: bool
    mean: bool
    channels: Sequence[int]
    channels_last: bool


# Which gradients are wanted: of each map, of scale, of shift.
FuseNeeds = tuple[Sequence[bool], bool, bool]
# Gradients of the maps (None where not wanted), of scale and of shift [sum of C_m].
FuseGradients = tuple[list[Tensor | None], Tensor | None, Tensor | None]


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    y = x.to(compute_dtype(x.dtype))
    if scale is not None:
        y = y * scale.to(y.dtype).reshape(-1, *[1] * (x.dim() - 2))
    if shift is not None:
        y = y + shift.to(y.dtype).reshape(-1, *[1] * (x.dim() - 2))
    return y


def fuse_concat_reference(
    features: Sequence[Tensor], scale: Tensor | None = None, shift: Tensor | None = None, relu: bool = False
) -> Tensor:
    """Specify :func:`fuse_concat`."""
    joined = torch.cat(list(features), dim=1)
    y = _affine(joined, scale, shift)
    return (y.relu() if relu else y).to(joined.dtype)


def fuse_mean_reference(
    features: Sequence[Tensor], scale: Tensor | None = None, shift: Tensor | None = None, relu: bool = False
) -> Tensor:
    """Specify :func:`fuse_mean`."""
    joined = torch.cat(list(features), dim=1)
    y = _affine(joined, scale, shift)
    y = y.relu() if relu else y
    head, *tail = y.tensor_split(len(features), dim=1)
    return (sum(tail, head) / len(features)).to(joined.dtype)


def fuse_backward_reference(
    grad: Tensor, features: Sequence[Tensor] | None, out: Tensor | None, call: FuseCall, needs: FuseNeeds
) -> FuseGradients:
    """Return the gradients by differentiable operations, with sums in fp64."""
    scale, shift, relu, mean, channels, _ = call
    need_features, need_scale, need_shift = needs
    wide = grad.to(compute_dtype(grad.dtype))
    if mean:
        wide = wide.repeat(1, len(channels), *[1] * (grad.dim() - 2)) / len(channels)
    joined = None if features is None else torch.cat(list(features), dim=1)
    if relu:
        # As torch's own ReLU: nothing passes where the result is 0, everything where it is NaN.
        result = out if joined is None else _affine(joined, scale, shift)
        assert result is not None
        wide = wide.masked_fill(result.detach() <= 0, 0)
    to_maps = _affine(wide, scale, None).to(grad.dtype).split(list(channels), dim=1)
    axes = [axis for axis in range(grad.dim()) if axis != 1]
    to_scale = to_shift = None
    if need_scale:
        assert joined is not None
        assert scale is not None
        to_scale = (wide.double() * joined).sum(axes).to(scale.dtype)
    if need_shift:
        assert shift is not None
        to_shift = wide.double().sum(axes).to(shift.dtype)
    maps = [x if need else None for x, need in zip(to_maps, need_features, strict=True)]
    return maps, to_scale, to_shift
