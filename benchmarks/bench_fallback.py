"""References, which serve where no kernel does, against the plainest PyTorch with their promises and without.

"With their promises": sums in fp64, whether everything is finite, the gradient's norm; for ``kl_div`` terms that do not
cancel for nearly equal rows.  "Without": what most training loops have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_aggregate import add_loop
from benchmarks.bench_distill import eager_kl, leaves, train_step
from benchmarks.bench_optimise import BETAS, DECAY, EPS, LR, MOMENTUM, Case
from benchmarks.harness import compare
from fedkern import ops

KEPT, LEFT = "with the promises", "without"
SIZES = [1_000_000, 11_000_000]
CLIENTS = 10


def measure(node: str, case: str, ours: Callable[[], Any], kept: Callable[[], Any], left: Callable[[], Any]) -> None:
    with ops.use_backend("reference"):
        compare(node, "fallback", case, {"fedkern": ours, KEPT: kept, LEFT: left}, pairs=15)


def promised(squared: Tensor, *written: Tensor) -> tuple[Tensor, Tensor]:
    """What a step returns."""
    finite = squared.isfinite()
    for tensor in written:
        finite = finite & tensor.isfinite().all()
    return finite, squared


@pytest.mark.parametrize("size", SIZES)
def test_sgd(node: str, size: int) -> None:
    case = Case(size)
    theta, g, v = case.held(1)

    def kept() -> tuple[Tensor, Tensor]:
        squared = g.double().square().sum()
        v.mul_(MOMENTUM).add_(g.add(theta, alpha=DECAY))
        theta.add_(v, alpha=-LR)
        g.zero_()
        return promised(squared, theta, v)

    measure(node, f"sgd_step P={size:,}", case.sgd(), kept, case.optim_sgd(foreach=False))


@pytest.mark.parametrize("size", SIZES)
def test_adamw(node: str, size: int) -> None:
    case = Case(size)
    theta, g, first, second = case.held(2)
    step = 0

    def kept() -> tuple[Tensor, Tensor]:
        nonlocal step
        step += 1
        squared = g.double().square().sum()
        first.lerp_(g, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        scale = second.sqrt().div_((1 - BETAS[1] ** step) ** 0.5).add_(EPS)
        theta.mul_(1 - LR * DECAY).addcdiv_(first, scale, value=-LR / (1 - BETAS[0] ** step))
        g.zero_()
        return promised(squared, theta, first, second)

    measure(node, f"adamw_step P={size:,}", case.adamw(), kept, case.optim_adamw(foreach=False))


@pytest.mark.parametrize("size", SIZES)
def test_weighted_mean(node: str, size: int) -> None:
    vectors, weights = [torch.randn(size) for _ in range(CLIENTS)], [float(10 + m) for m in range(CLIENTS)]
    out, others, more = torch.empty(size), torch.empty(size), torch.empty(size)

    def kept() -> Tensor:
        total = vectors[0].double() * weights[0]
        for vector, weight in zip(vectors[1:], weights[1:], strict=True):
            total += vector.double() * weight
        return others.copy_(total / sum(weights))

    run = partial(ops.weighted_mean, vectors, weights, out)
    measure(node, f"weighted_mean M={CLIENTS}, P={size:,}", run, kept, add_loop(vectors, weights, more))


@pytest.mark.parametrize("size", SIZES)
def test_accumulator(node: str, size: int) -> None:
    vector, sums = torch.randn(size), ops.Accumulator(size)
    wide, single = torch.zeros(size, dtype=torch.float64), torch.zeros(size)

    def kept() -> Tensor:
        return wide.add_(vector.double() * 0.5)

    left = partial(single.add_, vector, alpha=0.5)
    measure(node, f"Accumulator.add P={size:,}", partial(sums.add, vector, 0.5), kept, left)


def careful_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Terms P (eᵘ - 1 - u), of which none is negative; a class without P adds Q alone."""
    log_p, log_q = (teacher / temperature).log_softmax(1), (student / temperature).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    there = p > 0
    u = torch.where(there, log_q - log_p, 0)
    small = there & (u.abs() < 1)
    v = torch.where(small, u, 0)
    terms = torch.where(small, p * (torch.expm1(v) - v).clamp_min(0), q - p - p * u)
    return terms.sum() * (temperature**2 / len(terms))


@pytest.mark.parametrize("shape", [(64, 10), (4096, 100)], ids=str)
def test_kl_div(node: str, shape: tuple[int, int]) -> None:
    student, teacher = leaves(1, shape), torch.randn(shape)
    ours, kept, left = (train_step(loss, student, teacher, 2.0) for loss in (ops.kl_div, careful_kl, eager_kl))
    measure(node, f"kl_div {shape} T=2", ours, kept, left)
