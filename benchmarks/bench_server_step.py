"""Benchmark of server_step against the same in eager operations and torch.compile.

All implementations compute the new model, the states, every client's delta norm and its cosine to the mean delta, and
write the model, the states and all intermediate results into memory that they hold.  Model bytes: the uploads, the
global model and the states read once, the model and the states written once.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import compare
from fedkern import ops
from fedkern.ops._aggregate.rules import DEFAULTS


class Case:
    """Uploads shared by all implementations, each of which has a model and states of its own."""

    def __init__(self, count: int, size: int) -> None:
        torch.manual_seed(0)
        self.weights = [float(100 + 7 * m) for m in range(count)]
        self.shares = [weight / sum(self.weights) for weight in self.weights]
        self.global_ = torch.randn(size)
        self.vectors = [self.global_ + 0.01 * torch.randn(size) for _ in range(count)]
        self.settings = DEFAULTS["adam"]

    def allocate(self, count: int) -> list[Tensor]:
        """Return memory of the model's size."""
        return [torch.zeros_like(self.global_) for _ in range(count)]

    def fedkern(self) -> Callable[[], Tensor]:
        state, second, out = self.allocate(3)
        return lambda: (
            ops.server_step(self.global_, self.vectors, self.weights, "adam", first=state, second=second, out=out).model
        )

    def look(self, deltas: list[Tensor], mean: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Write the deltas and their mean, and return norms and cosines."""
        for vector, delta in zip(self.vectors, deltas, strict=True):
            torch.sub(vector, self.global_, out=delta)  # one pass less than _foreach_copy_ and _foreach_sub_
        norms = list(torch._foreach_norm(deltas))
        torch.mul(deltas[0], self.shares[0], out=mean)
        for delta, share in zip(deltas[1:], self.shares[1:], strict=True):
            mean.add_(delta, alpha=share)
        length = mean.norm()
        return norms, [torch.dot(delta, mean) / (norm * length) for delta, norm in zip(deltas, norms, strict=True)]

    def eager(self) -> Callable[[], Tensor]:
        _, rate, beta1, beta2, tau = self.settings
        deltas = self.allocate(len(self.vectors))
        mean, moment, second, root, out = self.allocate(5)

        def run() -> Tensor:
            self.look(deltas, mean)
            moment.lerp_(mean, 1 - beta1)
            second.mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
            torch.sqrt(second, out=root).add_(tau)
            return torch.addcdiv(self.global_, moment, root, value=rate, out=out)

        return run

    def compile_step(self) -> Callable[[], Tensor]:
        shares, (_, rate, beta1, beta2, tau) = self.shares, self.settings
        moment, second, out = self.allocate(3)

        def step(global_: Tensor, vectors: list[Tensor], moment: Tensor, second: Tensor, out: Tensor) -> Any:
            deltas = [vector - global_ for vector in vectors]
            mean = deltas[0] * shares[0]
            for delta, share in zip(deltas[1:], shares[1:], strict=True):
                mean = mean + delta * share
            length, norms = mean.norm(), [delta.norm() for delta in deltas]
            cosines = [(delta * mean).sum() / (norm * length) for delta, norm in zip(deltas, norms, strict=True)]
            moment.mul_(beta1).add_(mean, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
            out.copy_(global_ + rate * moment / (second.sqrt() + tau))
            return torch.stack(norms), torch.stack(cosines)

        function = torch.compile(step, dynamic=False)

        def run() -> Tensor:
            function(self.global_, self.vectors, moment, second, out)
            return out

        return run


@pytest.mark.parametrize(("count", "size"), [(10, 11_000_000), (50, 1_000_000), (10, 100_000)])
def test_adam(node: str, count: int, size: int, threads: int) -> None:
    case = Case(count, size)
    runs = {"fedkern": case.fedkern(), "eager": case.eager(), "compile in place": case.compile_step()}
    text, bytes_ = f"adam M={count} P={size:,} into out=", (count + 6) * size * 4
    compare(node, "server_step", text, runs, model_bytes=bytes_, copy=True, threads=threads, pairs=15)
