"""Benchmark of sgd_step and adamw_step against torch.optim, the same in eager operations, and torch.compile.

A federated client's network is one flat vector, and so torch.optim gets one parameter.  All implementations leave the
gradient's squared norm for the records, as the engine's training loop needs it, and zeros in the gradients for the next
batch.  Model bytes: parameters, gradients and states read once and written once.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import Implementation
from benchmarks.harness import compare
from fedkern import ops

SIZES = [1_000, 20_000, 200_000, 1_000_000, 11_000_000]
LR, MOMENTUM, DECAY = 1e-4, 0.9, 1e-4
BETAS, EPS = (0.9, 0.999), 1e-8


class Case:
    """One optimiser's vectors, of which every implementation has its own."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        self.start = torch.randn(size)

    def allocate(self, count: int) -> list[Tensor]:
        """Return the parameters, the gradients, and states of zeros."""
        return [self.start.clone(), 0.01 * self.start, *(torch.zeros_like(self.start) for _ in range(count))]

    def sgd(self) -> Callable[[], Tensor]:
        theta, g, v = self.allocate(1)
        step = partial(ops.sgd_step, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, zero=True)
        return lambda: step(theta, g, v).squared_norm

    def eager_sgd(self) -> Callable[[], Tensor]:
        """Return the expressions of the engine's training loop."""
        theta, g, v = self.allocate(1)

        def run() -> Tensor:
            squared = torch.dot(g, g)
            g.add_(theta, alpha=DECAY)
            v.mul_(MOMENTUM).add_(g)
            theta.add_(v, alpha=-LR)
            g.zero_()
            return squared

        return run

    def compiled_sgd(self) -> Callable[[], Tensor]:
        theta, g, v = self.allocate(1)

        def step(theta: Tensor, g: Tensor, v: Tensor) -> Tensor:
            squared = g.square().sum()
            v.mul_(MOMENTUM).add_(g + DECAY * theta)
            theta.sub_(LR * v)
            g.zero_()
            return squared

        function = torch.compile(step, dynamic=False)
        return lambda: function(theta, g, v)

    def optim_sgd(self, **kind: bool) -> Implementation:
        return self._optim(lambda leaf: torch.optim.SGD([leaf], LR, MOMENTUM, weight_decay=DECAY, **kind))

    def adamw(self) -> Callable[[], Tensor]:
        theta, g, moment, second = self.allocate(2)
        step = 0

        def run() -> Tensor:
            nonlocal step
            step += 1
            result = ops.adamw_step(
                theta, g, moment, second, step, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, zero=True
            )
            return result.squared_norm

        return run

    def eager_adamw(self) -> Callable[[], Tensor]:
        theta, g, moment, second = self.allocate(2)
        step = 0

        def run() -> Tensor:
            nonlocal step
            step += 1
            squared = torch.dot(g, g)
            theta.mul_(1 - LR * DECAY)
            moment.lerp_(g, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            scale = second.sqrt().div_((1 - BETAS[1] ** step) ** 0.5).add_(EPS)
            theta.addcdiv_(moment, scale, value=-LR / (1 - BETAS[0] ** step))
            g.zero_()
            return squared

        return run

    def optim_adamw(self, **kind: bool) -> Implementation:
        return self._optim(lambda leaf: torch.optim.AdamW([leaf], LR, BETAS, EPS, DECAY, **kind))

    def _optim(self, make: Callable[[torch.nn.Parameter], torch.optim.Optimizer]) -> Callable[[], Tensor]:
        theta, g = self.allocate(0)
        leaf = torch.nn.Parameter(theta)
        leaf.grad = g
        optimizer = make(leaf)

        def run() -> Tensor:
            squared = torch.dot(g, g)
            optimizer.step()
            g.zero_()
            return squared

        return run


KINDS: dict[str, dict[str, bool]] = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("size", SIZES)
def test_sgd(node: str, size: int, threads: int) -> None:
    case = Case(size)
    runs: dict[str, Implementation] = {"fedkern": case.sgd(), "eager": case.eager_sgd(), "compile": case.compiled_sgd()}
    runs |= {f"torch.optim.SGD {name}": case.optim_sgd(**kind) for name, kind in KINDS.items()}
    compare(node, "optimise", f"sgd P={size:,}", runs, model_bytes=6 * size * 4, copy=True, threads=threads, pairs=15)


@pytest.mark.parametrize("size", SIZES)
def test_adamw(node: str, size: int, threads: int) -> None:
    case = Case(size)
    runs: dict[str, Implementation] = {"fedkern": case.adamw(), "eager": case.eager_adamw()}
    runs |= {f"torch.optim.AdamW {name}": case.optim_adamw(**kind) for name, kind in KINDS.items()}
    compare(node, "optimise", f"adamw P={size:,}", runs, model_bytes=8 * size * 4, copy=True, threads=threads, pairs=15)
