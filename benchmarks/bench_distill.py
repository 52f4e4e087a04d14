"""kl_div, dual_kl, entropy against eager torch and torch.compile: forward and backward on leaf inputs.

Eager is the form people write, ``F.kl_div(log_softmax(s / T), softmax(t / T), "batchmean") * T²``; log_target=True is
not faster.  The temperature of distillation is rarely 1; the ``T=1`` rows leave the divisions out of eager's form.
Model bytes: every logit read once, every gradient written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contestants import liger_kl
from harness import compare
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, softmax

from fedkern import ops

SHAPES = [(64, 10), (4096, 100), (4096, 1000), (256, 32000)]
# Against eager and torch.compile, small and large shapes.
FLOORS = ({"eager": 2.5, "compile": 2.5}, {"eager": 3.0, "compile": 2.0})

GPU_FLOORS = {"eager": 3.0, "compile": 1.3, "Liger-Kernel": 1.0}  # at every size


def eager_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if temperature == 1:
        return kl_div(log_softmax(student, 1), softmax(teacher, 1), reduction="batchmean")
    p = softmax(teacher / temperature, 1)
    return kl_div(log_softmax(student / temperature, 1), p, reduction="batchmean") * temperature**2


def eager_dual(a: Tensor, b: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = softmax(teacher / temperature, 1)
    first = kl_div(log_softmax(a / temperature, 1), p, reduction="batchmean")
    return (first + kl_div(log_softmax(b / temperature, 1), p, reduction="batchmean")) * temperature**2


def eager_entropy(logits: Tensor) -> Tensor:
    log_p = log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum() / logits.shape[0]


def train_step(loss: Callable[..., Tensor], leaves: list[Tensor], *others: Any) -> Callable[[], None]:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves, *others).backward()

    return step


def leaves(count: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(count)]


def floors(shape: tuple[int, int]) -> dict[str, float]:
    return FLOORS[shape[0] * shape[1] >= 100_000]


SETTINGS = [(1, False), (2, False), (1, True), (2, True)]


@pytest.mark.parametrize(("threads", "loaded"), SETTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_div(benchmark: Any, shape: tuple[int, int], threads: int, loaded: bool) -> None:
    student, teacher = leaves(1, shape), torch.randn(shape)
    compare(
        benchmark,
        "kl_div",
        f"{shape} T=2",
        {
            "fedkern": train_step(ops.kl_div, student, teacher, 2.0),
            "eager": train_step(eager_kl, student, teacher, 2.0),
            "compile": train_step(torch.compile(eager_kl, dynamic=False), student, teacher, 2.0),
            "Liger-Kernel": liger_kl(student[0], teacher, 2.0),
        },
        model_bytes=3 * 4 * teacher.numel(),
        copy=True,
        floors=floors(shape),
        gpu_floors=GPU_FLOORS,
        threads=threads,
        loaded=loaded,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_div_without_temperature(benchmark: Any, shape: tuple[int, int]) -> None:
    student, teacher = leaves(1, shape), torch.randn(shape)
    compare(
        benchmark,
        "kl_div",
        f"{shape} T=1",
        {
            "fedkern": train_step(ops.kl_div, student, teacher, 1.0),
            "eager": train_step(eager_kl, student, teacher, 1.0),
            "compile": train_step(torch.compile(eager_kl, dynamic=False), student, teacher, 1.0),
        },
        model_bytes=3 * 4 * teacher.numel(),
        copy=True,
        threads=1,
        note="an empty autograd.Function takes two thirds of this time" if shape[0] == 64 else "",
    )


@pytest.mark.parametrize(("threads", "loaded"), SETTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dual_kl(benchmark: Any, shape: tuple[int, int], threads: int, loaded: bool) -> None:
    students, teacher = leaves(2, shape), torch.randn(shape)
    compare(
        benchmark,
        "dual_kl",
        f"{shape} T=2",
        {
            "fedkern": train_step(ops.dual_kl, students, teacher, 2.0),
            "eager": train_step(eager_dual, students, teacher, 2.0),
            "compile": train_step(torch.compile(eager_dual, dynamic=False), students, teacher, 2.0),
        },
        model_bytes=5 * 4 * teacher.numel(),
        copy=True,
        floors=floors(shape),
        gpu_floors=GPU_FLOORS,
        threads=threads,
        loaded=loaded,
    )


@pytest.mark.parametrize("case", ["scaled", "bfloat16", "maps", "channels_last"])
def test_kl_div_variants(benchmark: Any, case: str) -> None:
    """What else training does: a weighted loss (grad_output other than 1), half precision, segmentation logits."""
    shape: tuple[int, ...] = (8, 21, 128, 128) if case in ("maps", "channels_last") else (4096, 100)
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    student, teacher = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    if case == "channels_last":
        student, teacher = (x.to(memory_format=torch.channels_last) for x in (student, teacher))
    student.requires_grad_()
    factor = 0.3 if case == "scaled" else 1.0

    def ours(s: Tensor, t: Tensor) -> Tensor:
        loss = ops.kl_div(s, t, 2.0)
        return loss if factor == 1 else loss * factor

    def eager(s: Tensor, t: Tensor) -> Tensor:
        loss = eager_kl(s, t, 2.0)
        return loss if factor == 1 else loss * factor

    compare(
        benchmark,
        "kl_div",
        f"{shape} T=2 {case}",
        {
            "fedkern": train_step(ours, [student], teacher),
            "eager": train_step(eager, [student], teacher),
            "compile": train_step(torch.compile(eager, dynamic=False), [student], teacher),
        },
        model_bytes=3 * teacher.nbytes,
        copy=True,
        threads=1,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entropy(benchmark: Any, shape: tuple[int, int]) -> None:
    logits = leaves(1, shape)
    compare(
        benchmark,
        "entropy",
        f"{shape}",
        {
            "fedkern": train_step(ops.entropy, logits),
            "eager": train_step(eager_entropy, logits),
            "compile": train_step(torch.compile(eager_entropy, dynamic=False), logits),
        },
        model_bytes=2 * 4 * logits[0].numel(),
        copy=True,
        gpu_floors=GPU_FLOORS,
        threads=1,
    )
