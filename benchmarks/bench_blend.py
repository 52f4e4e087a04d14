"""Benchmark of blend against eager torch and torch.compile: forward and backward on leaf inputs.

Eager is the form people write, ``alpha * fg + (1 - alpha) * bg[index]``.  Model bytes of blend: two maps read and one
written forward, one read and two written backward.  Every implementation allocates its results afresh, as in training.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.harness import compare
from fedkern import ops

SHAPE = (64, 256, 14, 14)


def eager(foreground: Tensor, background: Tensor, alpha: float | Tensor, index: Tensor) -> Tensor:
    if isinstance(alpha, Tensor):
        alpha = alpha.reshape(-1, *[1] * (foreground.dim() - 1))
    return alpha * foreground + (1 - alpha) * background[index]


def fedkern(foreground: Tensor, background: Tensor, alpha: float | Tensor, index: Tensor) -> Tensor:
    return ops.blend(foreground, background, alpha, index=index)


def implementations(
    foreground: Tensor, background: Tensor, grad: Tensor, index: Tensor, alpha: float | Tensor = 0.6
) -> dict[str, Callable[[], None]]:
    """Return the implementations, each forward and backward into fresh gradients."""

    def make(function: Callable[..., Tensor]) -> Callable[[], None]:
        def step() -> None:
            foreground.grad = background.grad = None
            function(foreground, background, alpha, index).backward(grad)

        return step

    return {"fedkern": make(fedkern), "eager": make(eager), "compile": make(torch.compile(eager))}


def leaves(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    foreground, second, grad = (torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(3))
    return foreground.requires_grad_(), second.requires_grad_(), grad


@pytest.mark.parametrize("pick", ["permutation", "repeated"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [SHAPE, (256, 64, 32, 32)], ids=str)
def test_blend(node: str, shape: tuple[int, ...], layout: str, pick: str, threads: int) -> None:
    memory_format = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    foreground, background, grad = leaves(shape, memory_format, torch.float32)
    index = torch.randperm(shape[0]) if pick == "permutation" else torch.randint(0, shape[0], (shape[0],))

    bytes_ = 6 * foreground.numel() * 4
    runs = implementations(foreground, background, grad, index)
    case = f"{list(shape)} {layout}, {pick}"
    compare(node, "blend", case, runs, model_bytes=bytes_, copy=True, threads=threads)
