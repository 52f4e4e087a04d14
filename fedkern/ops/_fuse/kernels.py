"""fuse: the launcher that calls either compiled core."""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fedkern.ops._core.backend import compute_dtype, not_forced
from fedkern.ops._core.launch import Launcher
from fedkern.ops._core.memory import HUGE
from fedkern.ops._fuse.maps import empty_map
from fedkern.ops._fuse.reference import FuseCall, FuseGradients, FuseNeeds, fuse_backward_reference, fuse_mean_reference

_empty_like = torch.empty_like
_CHANNELS_LAST = torch.channels_last
_LARGE = HUGE // 8  # elements; fresh() compares bytes


class FuseKernels(Launcher):
    """``fuse_concat`` and ``fuse_mean`` of both compiled cores.

    Maps have shape ``[B, C_m, *S]``, one dtype and any strides. Products and sums are taken in fp32 (fp64 for fp64
    maps) and rounded once. A core that cannot read a map's layout returns False, and is called again with copies. On a
    GPU plain PyTorch computes a mean of more than 48 maps.

    Attributes:
        views: whether parts of the result's gradient are returned as views of it.
    """

    def __init__(self, core: ModuleType) -> None:
        super().__init__(core)
        self.views = not self.gpu
        self._forward, self._backward = core.fuse_forward, core.fuse_backward

    def forward(self, features: Sequence[Tensor], call: FuseCall) -> Tensor:
        """Compute ``act(scale * f_m + shift)``, concatenated or (``mean``) averaged, into a dense map."""
        scale, shift, relu, mean, channels, channels_last = call
        sample = features[0]
        if mean and (sample.is_contiguous(memory_format=_CHANNELS_LAST) if channels_last else sample.is_contiguous()):
            out = _empty_like(sample)  # takes half as long as making a map from its shape
        else:
            shape, width = sample.shape, channels[0] if mean else sum(channels)
            out = empty_map((shape[0], width, *shape[2:]), channels_last, sample)
        if out.numel() >= _LARGE:
            self.fresh(out)
        if mean and self._too_many(channels):
            return out.copy_(fuse_mean_reference(features, scale, shift, relu))
        at = self.at(sample)
        if not self._forward(features, out, scale, shift, channels_last, relu, mean, at):
            maps = [self._laid_out(x, channels_last) for x in features]
            scale, shift = _vector(scale, sample), _vector(shift, sample)
            done = self._forward(maps, out, scale, shift, channels_last, relu, mean, at)
            assert done
        return out

    def backward(
        self, grad: Tensor, features: Sequence[Tensor] | None, out: Tensor | None, call: FuseCall, needs: FuseNeeds
    ) -> FuseGradients:
        """Return the gradients that ``needs`` asks for, the maps' dense, the same bits every time.

        ``features`` are given for scale's gradient and for that of a mean of ReLUs. Without them ``out``, a
        concatenation with ReLU, shows where the gradient passes.
        """
        scale, shift, relu, mean, channels, channels_last = call
        need_features, need_scale, need_shift = needs
        targets = self._targets(grad, mean, channels, need_features, channels_last)
        if mean and self._too_many(channels):
            plain = fuse_backward_reference(grad, features, out, call, needs)
            for target, x in zip(targets, plain[0], strict=True):
                if target is not None and x is not None:
                    target.copy_(x)
            return targets, *plain[1:]
        to_scale = to_shift = partial = None
        if need_scale or need_shift:
            total = sum(channels)
            to_scale = grad.new_empty(total, dtype=torch.float64) if need_scale else None
            to_shift = grad.new_empty(total, dtype=torch.float64) if need_shift else None
            if self.gpu:
                partial = grad.new_empty(self.core.fuse_partials(total), dtype=torch.float64)
        trailing = (to_scale, to_shift, partial, channels_last, relu, mean, self.at(grad))
        if not self._backward(grad, features, out, targets, channels, scale, shift, *trailing):
            vectors = (_vector(scale, grad), _vector(shift, grad))
            features = None if features is None else [self._laid_out(x, channels_last) for x in features]
            out = None if out is None else self._laid_out(out, channels_last)
            grad = self._laid_out(grad, channels_last)
            done = self._backward(grad, features, out, targets, channels, *vectors, *trailing)
            assert done
        if to_scale is not None and scale is not None:
            to_scale = to_scale.to(scale.dtype)
        if to_shift is not None and shift is not None:
            to_shift = to_shift.to(shift.dtype)
        return targets, to_scale, to_shift

    def _too_many(self, channels: Sequence[int]) -> bool:
        if not self.gpu or len(channels) <= self.core.fuse_maps:
            return False
        not_forced("fuse_mean", "cuda", f"of {len(channels)} maps")
        return True

    def _targets(
        self, grad: Tensor, mean: bool, channels: Sequence[int], needs: Sequence[bool], channels_last: bool
    ) -> list[Tensor | None]:
        count, total = len(channels), grad.numel()
        if mean:
            total *= count
        if total >= _LARGE and not self.gpu and total // count < _LARGE and channels.count(channels[0]) == count:
            return self._pieces(grad, channels[0], needs, channels_last)
        shape = grad.shape
        targets: list[Tensor | None] = []
        width, target = -1, grad
        for m, number in enumerate(channels):
            if not needs[m]:
                targets.append(None)
                continue
            if number == width:
                target = _empty_like(target)
            else:
                width, target = number, empty_map((shape[0], number, *shape[2:]), channels_last, grad)
            if total >= _LARGE:
                self.fresh(target)
            targets.append(target)
        return targets

    def _pieces(self, grad: Tensor, channels: int, needs: Sequence[bool], channels_last: bool) -> list[Tensor | None]:
        """Allocate all maps at once: many small allocations would each fault on every page."""
        batch, _, *positions = grad.shape
        order = (batch, *positions, channels) if channels_last else (batch, channels, *positions)
        block = self.fresh(grad.new_empty((sum(needs), *order)))
        pieces = iter((block.movedim(-1, 2) if channels_last else block).unbind())
        return [next(pieces) if need else None for need in needs]

    def _laid_out(self, x: Tensor, channels_last: bool) -> Tensor:
        if self.core.fuse_reads(x, channels_last):
            return x
        if self.gpu:
            return empty_map(x.shape, False, x).copy_(x)
        by_channels = channels_last or math.prod(x.shape[2:]) == 1
        if x.numel() > 1 and not any(x.stride()):
            # One value for everything (the gradient of a sum): one run is enough.
            run = (1, x.shape[1]) if by_channels else (1, 1, *x.shape[2:])
            filled = x.as_strided(run, (0,) * len(run)).contiguous()
            return (filled.reshape(1, -1, *[1] * (x.dim() - 2)) if by_channels else filled).expand(x.shape)
        return empty_map(x.shape, by_channels, x).copy_(x)


def _vector(vector: Tensor | None, like: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(compute_dtype(like.dtype)).contiguous()
