"""fuse: from tensors to the CPU core's pointers, sizes and strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fedkern.ops._core.backend import DTYPES, address
from fedkern.ops._core.memory import HUGE, fresh
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

Map = tuple[int | None, int, int, int, int]


class CpuFuse:
    """``fuse_concat`` and ``fuse_mean`` of the compiled core; a :class:`~fedkern.ops._fuse.kernels.FuseKernel`."""

    def __init__(self, core: ModuleType) -> None:
        self.core = core
        self.fits = core.fuse_fits
        self._forward_alike, self._backward_alike = core.fuse_forward_alike, core.fuse_backward_alike

    def forward(
        self, features: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, relu: bool, mean: bool
    ) -> Tensor:
        first = features[0]
        shape, strides = first.shape, first.stride()
        size = math.prod(shape[2:])
        for x in features:
            if x.shape != shape or x.stride() != strides:
                channels = fused_channels([x.shape[1] for x in features], mean)
                channels_last = wants_channels_last(features)
                break
        else:
            channels = shape[1] if mean else shape[1] * len(features)
            channels_last = not first.is_contiguous() and order_of(first) == 1
        out = empty_map((shape[0], channels, *shape[2:]), channels_last, first)
        interleaved = channels_last or size == 1
        bytes_ = shape[0] * channels * size * first.itemsize
        if bytes_ >= HUGE:
            fresh(self.core, out)
        _alive, maps = _maps(features, interleaved)
        factor, summand = _vector(scale, first), _vector(shift, first)
        self.core.fuse_forward(
            DTYPES[first.dtype],
            shape[0],
            size,
            interleaved,
            relu,
            mean,
            maps,
            _map(out, interleaved),
            address(factor, "scale"),
            address(summand, "shift"),
            torch.get_num_threads(),
        )
        return out

    def forward_alike(
        self, features: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, relu: bool, mean: bool, last: bool
    ) -> Tensor:
        """:meth:`forward` in few steps, for maps of one shape that are all contiguous or (``last``) all channels-last.

        Scale and shift are contiguous and have the computing dtype.
        """
        first = features[0]
        if mean:
            out = _empty_like(first)
        else:
            shape = first.shape
            wide = (shape[0], shape[1] * len(features), *shape[2:])
            out = empty_map(wide, True, first) if last else first.new_empty(wide)
        if out.numel() >= _LARGE:
            fresh(self.core, out)
        self._forward_alike(features, out, scale, shift, last, relu, mean, _threads())
        return out

    def backward_alike(
        self, grad: Tensor, out: Tensor | None, scale: Tensor | None, mean: bool, needs: Sequence[bool], last: bool
    ) -> list[Tensor | None]:
        """Gradients of the maps of :meth:`forward_alike`, none of scale and shift; ``grad`` has the maps' layout."""
        batch, channels, *positions = grad.shape
        count = grad.numel()
        if not mean:
            channels //= len(needs)
            count //= len(needs)
        shape = (batch, channels, *positions)
        targets: list[Tensor | None]
        if count < _LARGE <= count * len(needs):
            targets = self._pieces(grad, shape, needs, last)
        else:
            one = empty_map(shape, True, grad) if last else grad.new_empty(shape)
            # empty_like takes half as long as making each map from its shape.
            targets = [one, *[_empty_like(one) if need else None for need in needs[1:]]]
            if not needs[0]:
                targets[0] = None
        if count >= _LARGE:
            for target in targets:
                if target is not None:
                    fresh(self.core, target)
        self._backward_alike(grad, out, targets, scale, last, mean, _threads())
        return targets

    def _pieces(self, like: Tensor, shape: tuple[int, ...], needs: Sequence[bool], last: bool) -> list[Tensor | None]:
        """Maps of ``shape`` in one allocation: many small allocations would each fault on every page."""
        batch, channels, *positions = shape
        order = (batch, *positions, channels) if last else shape
        whole = fresh(self.core, like.new_empty((sum(needs), *order)))
        pieces = iter((whole.movedim(-1, 2) if last else whole).unbind())
        return [next(pieces) if need else None for need in needs]

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
        batch, positions = grad.shape[0], grad.shape[2:]
        size = math.prod(positions)
        interleaved = channels_last or size == 1
        shapes = [(batch, count, *positions) for count in channels]
        targets = [
            fresh(self.core, empty_map(shape, channels_last, grad)) if need else None
            for shape, need in zip(shapes, needs.features, strict=True)
        ]
        by_scale = grad.new_empty(sum(channels), dtype=torch.float64) if needs.scale else None
        by_shift = grad.new_empty(sum(channels), dtype=torch.float64) if needs.shift else None
        _alive, maps = (None, None) if features is None else _maps(features, interleaved)
        grad, result = _laid_out(grad, interleaved), None if out is None else _laid_out(out, interleaved)
        factor, summand = _vector(scale, grad), _vector(shift, grad)
        self.core.fuse_backward(
            DTYPES[grad.dtype],
            batch,
            size,
            interleaved,
            relu,
            mean,
            _map(grad, interleaved),
            maps,
            None if result is None else _map(result, interleaved),
            [
                (None, count, 0, 0, 0) if target is None else _map(target, interleaved)
                for target, count in zip(targets, channels, strict=True)
            ],
            address(factor, "scale"),
            address(summand, "shift"),
            address(by_scale),
            address(by_shift),
            torch.get_num_threads(),
        )
        to_scale = None if by_scale is None or scale is None else by_scale.to(scale.dtype)
        to_shift = None if by_shift is None or shift is None else by_shift.to(shift.dtype)
        return FuseGradients(targets, to_scale, to_shift)


_empty_like, _threads = torch.empty_like, torch.get_num_threads
_LARGE = HUGE // 8  # elements; fresh() then checks the bytes


def _vector(vector: Tensor | None, like: Tensor) -> Tensor | None:
    """``scale`` or ``shift`` as the core takes it: contiguous, in the computing dtype."""
    vector = None if vector is None else vector.resolve_neg()
    if vector is None or (vector.dtype is compute_dtype(like.dtype) and vector.is_contiguous()):
        return vector
    return vector.to(compute_dtype(like.dtype)).contiguous()


def _laid_out(x: Tensor, interleaved: bool) -> Tensor:
    """``x``, copied if its inner axis in that order is not dense or no single stride leads through its positions."""
    if x.is_contiguous() and not interleaved:
        return x
    step = position_stride(x.shape, x.stride())
    if interleaved:
        if step is not None and (x.stride(1) == 1 or x.shape[1] == 1):
            return x
    elif step == 1:
        return x
    if x.numel() > 1 and not any(x.stride()):
        # One value for everything (the gradient of a sum): one run is enough.
        run = (1, x.shape[1]) if interleaved else (1, 1, *x.shape[2:])
        one = x.as_strided(run, (0,) * len(run)).contiguous()
        return (one.reshape(1, -1, *[1] * (x.dim() - 2)) if interleaved else one).expand(x.shape)
    return empty_map(x.shape, interleaved, x).copy_(x)


def _map(x: Tensor, interleaved: bool) -> Map:
    shape, strides = x.shape, x.stride()
    if not interleaved:
        return (address(x, "a feature map"), shape[1], strides[0], strides[1], 1)
    # To the core, samples of one position each are the positions of one sample.
    single = len(shape) == 2 or math.prod(shape[2:]) == 1
    return (
        address(x, "a feature map"),
        shape[1],
        strides[0],
        1,
        strides[0] if single else position_stride(shape, strides) or 0,
    )


def _maps(features: Sequence[Tensor], interleaved: bool) -> tuple[Sequence[Tensor], list[Map | int | None]]:
    """The maps laid out for the core, and their descriptions for it; keep the maps until the core returns.

    A description is an address alone if the map has the strides of the map before.
    """
    first = features[0]
    shape, strides = first.shape, first.stride()
    if _laid_out(first, interleaved) is first:
        for x in features:
            if x.stride() != strides or x.shape != shape:
                break
        else:
            return features, [_map(first, interleaved), *[address(x, "a feature map") for x in features[1:]]]
    copies = [_laid_out(x, interleaved) for x in features]
    return copies, [_map(x, interleaved) for x in copies]
