"""server_step against the same in foreach operations, torch.compile and NumPy as Flower does it.

Everybody computes the new model, the states, every client's delta norm and its cosine to the mean delta; Flower's
strategies have no norms and cosines, so neither has its row.  Model bytes: the uploads, the global model and the states
read once, the model and the states written once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from contestants import Absent, Contestant
from harness import compare
from torch import Tensor

from fedkern import ops

RATE, BETA1, BETA2, TAU = 0.1, 0.9, 0.99, 1e-9


class Case:
    """The uploads and the server's state, once for every contestant."""

    def __init__(self, count: int, size: int) -> None:
        torch.manual_seed(0)
        self.weights = [float(100 + 7 * m) for m in range(count)]
        self.shares = [weight / sum(self.weights) for weight in self.weights]
        self.global_ = torch.randn(size)
        self.vectors = [self.global_ + 0.01 * torch.randn(size) for _ in range(count)]
        self.out = torch.empty(size)
        self.states = [[torch.zeros(size), torch.zeros(size)] for _ in range(4)]

    def fedkern(self, rule: str) -> Callable[[], Any]:
        names = {"mean": (), "momentum": ("first",)}.get(rule, ("first", "second"))
        states = dict(zip(names, self.states[0], strict=False))
        return lambda: ops.server_step(self.global_, self.vectors, self.weights, rule, **states, out=self.out)

    def foreach(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        first, second = self.states[1]
        deltas = torch._foreach_sub(self.vectors, [self.global_] * len(self.vectors))
        norms = torch._foreach_norm(deltas)
        mean = deltas[0] * self.shares[0]
        for delta, share in zip(deltas[1:], self.shares[1:], strict=True):
            mean.add_(delta, alpha=share)
        length = mean.norm()
        cosines = [torch.dot(delta, mean) / (norm * length) for delta, norm in zip(deltas, norms, strict=True)]
        torch._foreach_mul_([first, second], [BETA1, BETA2])
        first.add_(mean, alpha=1 - BETA1)
        second.addcmul_(mean, mean, value=1 - BETA2)
        return torch.addcdiv(self.global_, first, second.sqrt().add_(TAU), value=RATE), norms, cosines

    def compiled(self) -> Callable[[], Any]:
        shares = self.shares

        def step(global_: Tensor, vectors: list[Tensor], first: Tensor, second: Tensor) -> Any:
            deltas = [vector - global_ for vector in vectors]
            mean = deltas[0] * shares[0]
            for delta, share in zip(deltas[1:], shares[1:], strict=True):
                mean = mean + delta * share
            length, norms = mean.norm(), [delta.norm() for delta in deltas]
            cosines = [(delta * mean).sum() / (norm * length) for delta, norm in zip(deltas, norms, strict=True)]
            first.mul_(BETA1).add_(mean, alpha=1 - BETA1)
            second.mul_(BETA2).addcmul_(mean, mean, value=1 - BETA2)
            return global_ + RATE * first / (second.sqrt() + TAU), torch.stack(norms), torch.stack(cosines)

        compiled = torch.compile(step)
        return lambda: compiled(self.global_, self.vectors, *self.states[2])

    def flower(self) -> Contestant:
        """flwr.server.strategy.FedAdam: the weighted average layer by layer, then array by array."""
        if self.global_.device.type != "cpu":
            return Absent("NumPy computes on the CPU")
        layers = 62
        clients = [np.array_split(vector.numpy(), layers) for vector in self.vectors]
        old = np.array_split(self.global_.numpy(), layers)
        states = [[np.array_split(state.numpy(), layers) for state in self.states[3]]]

        def run() -> Any:
            total = sum(self.weights)
            weighted = [[x * w for x in client] for client, w in zip(clients, self.weights, strict=True)]
            means = [reduce(np.add, updates) / total for updates in zip(*weighted, strict=True)]
            deltas = [x - y for x, y in zip(means, old, strict=True)]
            first = [BETA1 * m + (1 - BETA1) * d for m, d in zip(states[0][0], deltas, strict=True)]
            second = [BETA2 * v + (1 - BETA2) * d * d for v, d in zip(states[0][1], deltas, strict=True)]
            states[0] = [first, second]
            return [x + RATE * m / (np.sqrt(v) + TAU) for x, m, v in zip(old, first, second, strict=True)]

        return run


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("count", "size"), [(10, 11_000_000), (50, 1_000_000), (10, 100_000)])
def test_adam(benchmark: Any, count: int, size: int, threads: int) -> None:
    case = Case(count, size)
    runs: dict[str, Contestant] = {
        "fedkern": case.fedkern("adam"),
        "foreach": case.foreach,
        "compile": case.compiled(),
        "Flower": case.flower(),
    }
    floors = {"foreach": 3.0, "compile": 1.3} if size == 11_000_000 and threads == 1 else {}
    compare(
        benchmark,
        "server_step",
        f"adam M={count} P={size:,} into out=",
        runs,
        model_bytes=(count + 6) * size * 4,
        copy=True,
        floors=floors,
        threads=threads,
        pairs=15,
    )


@pytest.mark.parametrize("rule", ["mean", "momentum", "yogi", "adagrad"])
def test_rules(benchmark: Any, rule: str) -> None:
    """What the other rules cost beside Adam, and the norms and cosines beside a bare mean."""
    count, size = 10, 1_000_000
    case = Case(count, size)
    runs = {
        "fedkern": case.fedkern(rule),
        "adam": case.fedkern("adam"),
        "weighted_mean": lambda: ops.weighted_mean(case.vectors, case.weights, out=case.out),
    }
    states = {"mean": 0, "momentum": 2}.get(rule, 4)
    bytes_ = (count + 2 + states) * size * 4
    compare(
        benchmark,
        "server_step",
        f"{rule} M={count} P={size:,} into out=",
        runs,
        model_bytes=bytes_,
        copy=True,
        threads=1,
    )
