"""Benchmark of fuse_concat and fuse_mean against eager torch and torch.compile.

fuse_concat runs against ``relu(batch_norm(cat(maps)))`` with a frozen batch norm, forward alone and forward + backward
on leaf maps.  Model bytes: every map read and written once (backward: the gradient and the result read, the maps'
gradients written).
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import compare
from fedkern import ops

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Norm:
    """Frozen batch norm, as torch takes it and as scale and shift."""

    def __init__(self, channels: int) -> None:
        self.mean, self.weight, self.bias = (torch.randn(channels) for _ in range(3))
        self.var = torch.rand(channels) + 0.5
        self.scale = self.weight * torch.rsqrt(self.var + 1e-5)
        self.shift = self.bias - self.scale * self.mean


def eager(maps: Sequence[Tensor], norm: Norm) -> Tensor:
    joined = torch.cat(list(maps), 1)
    return F.relu(F.batch_norm(joined, norm.mean, norm.var, norm.weight, norm.bias, False))


def eager_mean(maps: Sequence[Tensor], norm: Norm) -> Tensor:
    return eager(maps, norm).unflatten(1, (len(maps), -1)).mean(1)


def fuse(maps: Sequence[Tensor], norm: Norm) -> Tensor:
    return ops.fuse_concat(maps, norm.scale, norm.shift, "relu")


def fused_mean(maps: Sequence[Tensor], norm: Norm) -> Tensor:
    return ops.fuse_mean(maps, norm.scale, norm.shift, "relu")


def implementations(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    make: Callable[[Callable[..., Tensor]], Callable[[], Any]],
) -> dict[str, Callable[[], Any]]:
    return {"fedkern": make(ours), "eager": make(theirs), "compile": make(torch.compile(theirs))}


def maps_of(count: int, shape: tuple[int, ...], layout: str) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]) for _ in range(count)]


def forward(maps: Sequence[Tensor], norm: Norm) -> Callable[[Callable[..., Tensor]], Callable[[], Any]]:
    def make(function: Callable[..., Tensor]) -> Callable[[], Any]:
        def run() -> Tensor:
            with torch.no_grad():
                return function(maps, norm)

        return run

    return make


def training(maps: Sequence[Tensor], norm: Norm, grad: Tensor) -> Callable[[Callable[..., Tensor]], Callable[[], Any]]:
    leaves = [x.requires_grad_() for x in maps]

    def make(function: Callable[..., Tensor]) -> Callable[[], Any]:
        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            function(leaves, norm).backward(grad)

        return run

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [5, 10])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_fuse_concat(node: str, count: int, layout: str, backward: bool, threads: int) -> None:
    shape = (64, 64, 32, 32)
    maps, norm = maps_of(count, shape, layout), Norm(64 * count)
    size = sum(x.nbytes for x in maps)
    make = forward(maps, norm)
    if backward:
        grad = torch.randn(64, 64 * count, 32, 32).contiguous(memory_format=LAYOUTS[layout])
        make = training(maps, norm, grad)
    case = f"M={count} {list(shape)} {layout}, {'forward + backward' if backward else 'forward'}"
    runs = implementations(fuse, eager, make)
    bytes_ = (5 if backward else 2) * size
    compare(node, "fuse_concat", case, runs, model_bytes=bytes_, copy=True, pairs=9, threads=threads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 20, 16, 16), (64, 64, 16, 16), (64, 64, 32, 32)], ids=str)
def test_fuse_mean(node: str, layout: str, shape: tuple[int, ...], threads: int) -> None:
    maps, norm = maps_of(10, shape, layout), Norm(10 * shape[1])
    grad = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    case = f"M=10 {list(shape)} {layout}, forward + backward"
    runs = implementations(fused_mean, eager_mean, training(maps, norm, grad))
    bytes_ = 3 * sum(x.nbytes for x in maps) + 2 * maps[0].nbytes
    compare(node, "fuse_mean", case, runs, model_bytes=bytes_, copy=True, pairs=9, threads=threads)
