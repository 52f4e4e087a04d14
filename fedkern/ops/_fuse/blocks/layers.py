"""FusedBlocks: the layers of M blocks as one layer each, with concatenated parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.ops._core.layout import conv2d, normed
from fedkern.ops._fuse.blocks.choice import Work


class FusedLayer(nn.Module):
    """M layers of one shape as one; every parameter and buffer concatenates those of the M layers along axis 0.

    Attributes:
        branches: M.
        axes: numbers of axes that the input may have; None: any number from 2 on.
        reads: channels (for a linear layer: features) that a branch reads; None: any.
    """

    axes: tuple[int, ...] | None = None
    reads: int | None = None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = len(layers)
        self.training = layers[0].training
        first = layers[0]
        for name, tensor in first.named_parameters(recurse=False):
            parts = [layer.get_parameter(name) for layer in layers]
            joined = join([p.detach() for p in parts], tensor)
            self.register_parameter(name, nn.Parameter(joined, requires_grad=tensor.requires_grad))
        for name, buffer in first.named_buffers(recurse=False):
            self.register_buffer(name, join([layer.get_buffer(name) for layer in layers], buffer))
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if not hasattr(self, name):
                self.register_parameter(name, None)

    def part(self, name: str, m: int) -> Tensor:
        """Branch m's slice of parameter or buffer ``name``, a view."""
        tensor = cast(Tensor, getattr(self, name))
        if name == "num_batches_tracked":
            return tensor[m]
        rows = tensor.shape[0] // self.branches
        return tensor[m * rows : (m + 1) * rows]

    def maybe(self, name: str, m: int) -> Tensor | None:
        return None if getattr(self, name) is None else self.part(name, m)

    def run(self, x: Tensor, shared: bool) -> Tensor:
        """All branches: ``x`` is one input for all (``shared``), or M inputs concatenated along the channels."""
        raise NotImplementedError

    def run_one(self, x: Tensor, m: int) -> Tensor:
        """Branch m on its own input."""
        raise NotImplementedError


def join(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """``parts`` concatenated along axis 0 (scalars are stacked), in their memory format."""
    if not like.dim():
        return torch.stack(list(parts))
    joined = torch.cat(list(parts))
    if like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        joined = joined.contiguous(memory_format=torch.channels_last)
    return joined


class FusedConv(FusedLayer):
    """M convolutions as one: of all output channels on a shared input, grouped on M inputs."""

    def __init__(self, layers: Sequence[nn.Conv2d]) -> None:
        super().__init__(layers)
        first = layers[0]
        self.kernel, self.stride, self.padding = first.kernel_size, first.stride, first.padding
        self.dilation, self.groups = first.dilation, first.groups
        self.axes, self.reads = (4,), first.in_channels
        self.shape = (first.out_channels * self.branches, first.in_channels // first.groups, *first.kernel_size)

    def result_shape(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """Shape of a convolution of ``x`` with ``weight``; not for padding given by name."""
        size = [
            (n + 2 * int(pad) - step * (k - 1) - 1) // stride + 1
            for n, pad, step, k, stride in zip(
                x.shape[2:], cast(Any, self.padding), self.dilation, weight.shape[2:], self.stride, strict=True
            )
        ]
        return (x.shape[0], weight.shape[0], *size)

    def shape_after(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one branch's result from that of its input; sizes below 1 where the input is too small."""
        size = []
        for axis, n in enumerate(shape[2:]):
            reach = self.dilation[axis] * (int(self.kernel[axis]) - 1)
            pad = {"same": reach, "valid": 0}[self.padding] if isinstance(self.padding, str) else 2 * self.padding[axis]
            size.append((n + int(pad) - reach - 1) // self.stride[axis] + 1)
        return (shape[0], self.shape[0] // self.branches, *size)

    def run(self, x: Tensor, shared: bool) -> Tensor:
        if shared and self.groups > 1:
            x, shared = x.repeat(1, self.branches, 1, 1), False
        groups = self.groups if shared else self.groups * self.branches
        return conv2d(x, cast(Tensor, self.weight), self.bias, self.stride, self.padding, self.dilation, groups)

    def work(self, result: Sequence[int]) -> Work:
        """What a branch's result of this shape costs."""
        positions = math.prod(result[2:])
        taps, width = math.prod(self.kernel), self.shape[0] // self.branches
        return Work(taps, width, math.sqrt(positions), width * self.shape[1] * taps * positions)

    def run_one(self, x: Tensor, m: int) -> Tensor:
        weight, bias = self.part("weight", m), self.maybe("bias", m)
        return conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class FusedLinear(FusedLayer):
    """M linear layers as one matrix product on a shared input, or as a batched product on M inputs.

    Inputs are ``[B, features]`` or ``[B, C, ..., features]``.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(layers)
        self.reads, self.writes = layers[0].in_features, layers[0].out_features

    def run(self, x: Tensor, shared: bool) -> Tensor:
        weight = cast(Tensor, self.weight)
        if shared:
            out = F.linear(x, weight, self.bias)
            # With more than two axes the last one is the features, and the branches are concatenated along axis 1.
            return out if x.dim() == 2 else out.unflatten(-1, (self.branches, -1)).movedim(-2, 1).flatten(1, 2)
        rows = x.unflatten(1, (self.branches, -1)).movedim(1, 0)
        each = torch.bmm(rows.flatten(1, -2), weight.unflatten(0, (self.branches, -1)).transpose(1, 2))
        if self.bias is not None:
            # Under autocast the product has 16 bits, and the bias 32.
            each = each + self.bias.unflatten(0, (self.branches, 1, -1)).to(each.dtype)
        return each.unflatten(1, rows.shape[1:-1]).movedim(0, 1).flatten(1, 2)

    def run_one(self, x: Tensor, m: int) -> Tensor:
        return F.linear(x, self.part("weight", m), self.maybe("bias", m))


class FusedBatchNorm(FusedLayer):
    """M batch norms as one, since batch norm treats every channel by itself."""

    def __init__(self, layers: Sequence[nn.BatchNorm1d | nn.BatchNorm2d]) -> None:
        super().__init__(layers)
        first = layers[0]
        self.axes, self.reads = (4,) if isinstance(first, nn.BatchNorm2d) else (2, 3), first.num_features
        self.eps, self.momentum, self.track = first.eps, first.momentum, first.track_running_stats

    def _count(self, branches: Sequence[int]) -> list[float]:
        """Counts a batch of training; returns for each branch the weight of the batch's statistics."""
        if not (self.training and self.track):
            return [0.0] * len(branches)
        counts = cast(Tensor, self.num_batches_tracked)
        for m in branches:
            counts[m] += 1
        if self.momentum is not None:
            return [self.momentum] * len(branches)
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "FusedBlocks cannot train batch norms with momentum=None under torch.compile, which cannot follow how "
                "many batches they have seen; set a momentum, call eval(), or do not compile this module"
            )
        return [1.0 / n for n in counts[list(branches)].tolist()]

    def run(self, x: Tensor, shared: bool) -> Tensor:
        if shared:
            x = x.repeat(1, self.branches, *[1] * (x.dim() - 2))
        weights = self._count(range(self.branches))
        if len(set(weights)) == 1:
            return self._apply_norm(x, weights[0], self.running_mean, self.running_var, self.weight, self.bias)
        parts = x.tensor_split(self.branches, dim=1)
        return torch.cat([self._one(part, m, weights[m]) for m, part in enumerate(parts)], dim=1)

    def run_one(self, x: Tensor, m: int) -> Tensor:
        return self._one(x, m, self._count([m])[0])

    def _one(self, x: Tensor, m: int, weight: float) -> Tensor:
        tensors = [self.maybe(name, m) for name in ("running_mean", "running_var", "weight", "bias")]
        return self._apply_norm(x, weight, *tensors)

    def _apply_norm(self, x: Tensor, momentum: float, *statistics_and_affine: Tensor | None) -> Tensor:
        batch_statistics = self.training or not self.track
        return normed(F.batch_norm, x, *statistics_and_affine, batch_statistics, momentum, self.eps)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift ``[M * C]`` that compute the same as the batch norm in evaluation mode."""
        mean, var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        return scale, shift if self.bias is None else shift + self.bias


class FusedGroupNorm(FusedLayer):
    """M group norms as one with M times the groups."""

    def __init__(self, layers: Sequence[nn.GroupNorm]) -> None:
        super().__init__(layers)
        self.groups, self.eps = layers[0].num_groups, layers[0].eps
        self.reads = layers[0].num_channels

    def run(self, x: Tensor, shared: bool) -> Tensor:
        if shared:
            x = x.repeat(1, self.branches, *[1] * (x.dim() - 2))
        return F.group_norm(x, self.groups * self.branches, self.weight, self.bias, self.eps)

    def run_one(self, x: Tensor, m: int) -> Tensor:
        return F.group_norm(x, self.groups, self.maybe("weight", m), self.maybe("bias", m), self.eps)


def fuse_layers(layers: Sequence[Any]) -> nn.Module:
    """The M layers as one; if they have no parameters, the first layer itself."""
    first = layers[0]
    if isinstance(first, nn.Conv2d):
        return FusedConv(layers)
    if isinstance(first, nn.Linear):
        return FusedLinear(layers)
    if isinstance(first, nn.GroupNorm):
        return FusedGroupNorm(layers)
    if isinstance(first, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return FusedBatchNorm(layers)
    return first
