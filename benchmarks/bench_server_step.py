"""server_step against the same in eager operations, torch.compile, apex and NumPy as Flower does it.

Everybody computes the new model, the states, every client's delta norm and its cosine to the mean delta; Flower's
strategies have no norms and cosines, so neither has its row.  Everybody writes the model, the states and whatever lies
between into memory that it holds: Flower's own FedAdam would allocate its arrays, here they are NumPy's out=.  Model
bytes: the uploads, the global model and the states read once, the model and the states written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from contestants import Absent, Contestant, apex_adam
from flower_means import inplace_mean, layers
from harness import compare
from torch import Tensor

from fedkern import ops
from fedkern.ops._aggregate.rules import DEFAULTS


class Case:
    """The uploads, once for every contestant; each has a model and states of its own."""

    def __init__(self, count: int, size: int) -> None:
        torch.manual_seed(0)
        self.weights = [float(100 + 7 * m) for m in range(count)]
        self.shares = [weight / sum(self.weights) for weight in self.weights]
        self.global_ = torch.randn(size)
        self.vectors = [self.global_ + 0.01 * torch.randn(size) for _ in range(count)]
        self.settings = DEFAULTS["adam"]

    def held(self, count: int) -> list[Tensor]:
        """Memory of the model's size."""
        return [torch.zeros_like(self.global_) for _ in range(count)]

    def fedkern(self) -> Callable[[], Tensor]:
        first, second, out = self.held(3)
        return lambda: (
            ops.server_step(self.global_, self.vectors, self.weights, "adam", first=first, second=second, out=out).model
        )

    def look(self, deltas: list[Tensor], mean: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Writes the deltas and their mean; returns norms and cosines."""
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
        deltas = self.held(len(self.vectors))
        mean, first, second, root, out = self.held(5)

        def run() -> Tensor:
            self.look(deltas, mean)
            first.lerp_(mean, 1 - beta1)
            second.mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
            torch.sqrt(second, out=root).add_(tau)
            return torch.addcdiv(self.global_, first, root, value=rate, out=out)

        return run

    def compiled(self) -> Callable[[], Tensor]:
        shares, (_, rate, beta1, beta2, tau) = self.shares, self.settings
        first, second, out = self.held(3)

        def step(global_: Tensor, vectors: list[Tensor], first: Tensor, second: Tensor, out: Tensor) -> Any:
            deltas = [vector - global_ for vector in vectors]
            mean = deltas[0] * shares[0]
            for delta, share in zip(deltas[1:], shares[1:], strict=True):
                mean = mean + delta * share
            length, norms = mean.norm(), [delta.norm() for delta in deltas]
            cosines = [(delta * mean).sum() / (norm * length) for delta, norm in zip(deltas, norms, strict=True)]
            first.mul_(beta1).add_(mean, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
            out.copy_(global_ + rate * first / (second.sqrt() + tau))
            return torch.stack(norms), torch.stack(cosines)

        function = torch.compile(step, dynamic=False)

        def run() -> Tensor:
            function(self.global_, self.vectors, first, second, out)
            return out

        return run

    def apex(self) -> Contestant:
        """The deltas as in eager torch, then the update by apex's kernel, which changes parameters in place."""
        _, rate, beta1, beta2, tau = self.settings
        mean, gradient, first, second, out = self.held(5)
        update = apex_adam(out, gradient, first, second, rate, (beta1, beta2), tau)
        if isinstance(update, Absent):
            return update
        deltas = self.held(len(self.vectors))

        def run() -> Tensor:
            self.look(deltas, mean)
            torch.neg(mean, out=gradient)
            out.copy_(self.global_)
            update()
            return out

        return run

    def flower(self) -> Contestant:
        """flwr.server.strategy.FedAdam without its bias correction: the in-place mean, then array by array."""
        first, second, out = self.held(3)
        average = inplace_mean(self.vectors, self.weights, out)
        if isinstance(average, Absent):
            return average
        _, rate, beta1, beta2, tau = self.settings
        arrays = [layers(x) for x in (self.global_, first, second)]
        round_cache = np.empty_like(arrays[0][0])
        rooms = [round_cache[: len(layer)] for layer in arrays[0]]

        def run() -> Tensor:
            for delta, old, m, v, room in zip(average(), *arrays, rooms, strict=True):
                np.subtract(delta, old, out=delta)
                np.multiply(m, beta1, out=m)
                np.add(m, np.multiply(delta, 1 - beta1, out=room), out=m)
                np.multiply(np.multiply(delta, delta, out=room), 1 - beta2, out=room)
                np.add(np.multiply(v, beta2, out=v), room, out=v)
                np.add(np.sqrt(v, out=room), tau, out=room)
                np.multiply(np.divide(m, room, out=room), rate, out=room)
                np.add(old, room, out=delta)
            return out

        return run


@pytest.mark.parametrize(("count", "size"), [(10, 11_000_000), (50, 1_000_000), (10, 100_000)])
def test_adam(node: str, count: int, size: int, threads: int) -> None:
    case = Case(count, size)
    runs: dict[str, Contestant] = {
        "fedkern": case.fedkern(),
        "eager": case.eager(),
        "compile in place": case.compiled(),
        "Flower": case.flower(),
        "apex": case.apex(),
    }
    compare(
        node,
        "server_step",
        f"adam M={count} P={size:,} into out=",
        runs,
        model_bytes=(count + 6) * size * 4,
        copy=True,
        threads=threads,
        pairs=15,
    )
