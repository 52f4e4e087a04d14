"""Benchmark of kl_div (all logits, or stored teachers), dual_kl and entropy against eager torch and torch.compile.

Forward and backward on leaf inputs.

Eager is the form people write, ``F.kl_div(log_softmax(s / T), softmax(t / T), "batchmean") * T²``; log_target=True is
not faster.
Model bytes: every logit read once, every gradient written once.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, softmax

from benchmarks.baselines import liger_kl
from benchmarks.harness import compare, contest
from fedkern import ops

STORED = {(64, 10): 4, (4096, 100): 8, (4096, 1000): 16, (256, 32000): 64}  # classes that a stored teacher has
SHAPES = list(STORED)


def eager_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = softmax(teacher / temperature, 1)
    return kl_div(log_softmax(student / temperature, 1), p, reduction="batchmean") * temperature**2


def eager_stored(student: Tensor, values: Tensor, indices: Tensor, temperature: float) -> Tensor:
    log_q = log_softmax(student / temperature, 1).gather(1, indices)
    return kl_div(log_q, softmax(values / temperature, 1), reduction="batchmean") * temperature**2


def eager_dual(a: Tensor, b: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = softmax(teacher / temperature, 1)
    divergence = kl_div(log_softmax(a / temperature, 1), p, reduction="batchmean")
    return (divergence + kl_div(log_softmax(b / temperature, 1), p, reduction="batchmean")) * temperature**2


def eager_entropy(logits: Tensor) -> Tensor:
    log_p = log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum() / logits.shape[0]


def leaves(count: int, shape: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_div(node: str, shape: tuple[int, int], threads: int) -> None:
    student, teacher = leaves(1, shape), torch.randn(shape)
    compare(
        node,
        "kl_div",
        f"{shape} T=2",
        {**contest(ops.kl_div, eager_kl, student, teacher, 2.0), "Liger-Kernel": liger_kl(student[0], teacher, 2.0)},
        model_bytes=3 * 4 * teacher.numel(),
        copy=True,
        threads=threads,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparse_kl(node: str, shape: tuple[int, int], threads: int) -> None:
    student, teacher = leaves(1, shape), torch.randn(shape).topk(STORED[shape])

    def ours(logits: Tensor, values: Tensor, indices: Tensor, temperature: float) -> Tensor:
        return ops.kl_div(logits, (values, indices), temperature)

    compare(
        node,
        "sparse_kl",
        f"{shape} k={STORED[shape]} T=2",
        contest(ours, eager_stored, student, *teacher, 2.0),
        model_bytes=2 * 4 * student[0].numel() + 12 * teacher.values.numel(),
        copy=True,
        threads=threads,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dual_kl(node: str, shape: tuple[int, int], threads: int) -> None:
    students, teacher = leaves(2, shape), torch.randn(shape)
    compare(
        node,
        "dual_kl",
        f"{shape} T=2",
        contest(ops.dual_kl, eager_dual, students, teacher, 2.0),
        model_bytes=5 * 4 * teacher.numel(),
        copy=True,
        threads=threads,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entropy(node: str, shape: tuple[int, int], threads: int) -> None:
    logits = leaves(1, shape)
    compare(
        node,
        "entropy",
        f"{shape}",
        contest(ops.entropy, eager_entropy, logits),
        model_bytes=2 * 4 * logits[0].numel(),
        copy=True,
        threads=threads,
    )
