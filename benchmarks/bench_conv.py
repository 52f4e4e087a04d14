"""Benchmark of conv_norm against eager torch and torch.compile: a stage forward and backward, batch norm in train mode.

Maps are channels-last.  Eager is the form of networks in PyTorch: ``F.conv2d``, ``F.batch_norm``, the residual, the
ReLU and the max pooling.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import compare
from fedkern import ops


@dataclass(frozen=True)
class Stage:
    """A call, which needs gradients of maps but not of images."""

    channels: int
    width: int
    size: int
    pool: int = 1
    residual: bool = False
    taps: int = 3

    def inputs(self, batch: int) -> list[Tensor]:
        """Return x, weight, scale, shift, both running statistics and the residual, if there is one."""
        x = channels_last(batch, self.channels, self.size, self.size).requires_grad_(self.channels > 3)
        weight = channels_last(self.width, self.channels, self.taps, self.taps) / (self.taps * self.channels**0.5)
        scale, shift, mean, variance = (fill(self.width) for fill in (torch.ones, torch.zeros, torch.zeros, torch.ones))
        tensors = [x, weight.requires_grad_(), scale.requires_grad_(), shift.requires_grad_(), mean, variance]
        if self.residual:
            tensors.append(channels_last(batch, self.width, self.size, self.size).requires_grad_())
        return tensors


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def eager(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, *rest: Tensor,
          pool: int) -> Tensor:  # fmt: skip
    y = F.batch_norm(F.conv2d(x, weight, padding=weight.shape[2] // 2), mean, variance, scale, shift, training=True)
    y = F.relu(y + rest[0] if rest else y)
    return F.max_pool2d(y, pool) if pool > 1 else y


def operator(*tensors: Tensor, pool: int) -> Tensor:
    return ops.conv_norm(*tensors[:6], pool=pool, residual=tensors[6] if len(tensors) > 6 else None)


def train_step(function: Callable[..., Tensor], inputs: list[Tensor], pool: int) -> Callable[[], None]:
    with torch.no_grad():
        grad = torch.randn_like(function(*inputs, pool=pool))

    def step() -> None:
        for tensor in inputs:
            tensor.grad = None
        function(*inputs, pool=pool).backward(grad)

    return step


STAGES = {
    "cnn/8, stage 1": Stage(3, 8, 32, pool=2),
    "cnn/8, stage 2": Stage(8, 16, 16, pool=2),
    "cnn/7, stage 1": Stage(3, 7, 32, pool=2),
    "cnn/7, stage 2": Stage(7, 14, 16, pool=2),
    "cnn/7, stage 3": Stage(14, 28, 8, pool=2),
    "cnn/32, stage 1": Stage(3, 32, 32, pool=2),
    "cnn/32, stage 2": Stage(32, 64, 16, pool=2),
    "cnn/32, stage 3": Stage(64, 128, 8, pool=2),
    "resnet8, width 16": Stage(16, 16, 32, residual=True),
    "resnet8, width 64": Stage(64, 64, 8, residual=True),
    "one tap, width 64": Stage(32, 64, 16, taps=1),
    "resnet18, width 256": Stage(256, 256, 8, residual=True),
}


@pytest.mark.parametrize("batch", [8, 32, 64])
@pytest.mark.parametrize("name", STAGES)
def test_conv_norm(node: str, name: str, batch: int, threads: int) -> None:
    stage = STAGES[name]
    inputs = stage.inputs(batch)
    compare(
        node,
        "conv",
        f"{name}, B={batch}",
        {
            "fedkern": train_step(operator, inputs, stage.pool),
            "eager": train_step(eager, inputs, stage.pool),
            "compile": train_step(torch.compile(eager, dynamic=False), inputs, stage.pool),
        },
        threads=threads,
    )
