"""Tests of ensemble_kl, js_div and consensus on CUDA: sizes where other kernels take over, and what is kept."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._distill.ensemble_reference import ensemble_reference, js_reference
from fedkern.ops._distill.rows import PROBS
from python_tests.ops._distill import ensemble_cases
from python_tests.ops._distill.ensemble_cases import MIXES
from python_tests.ops.operator_cases import assert_close

OPERATORS = ("probs", "logits", "mean", "js_div", "consensus")


# Rows that a thread or a block holds, and those that are one number too long for it.
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("values", ["normal", "equal"])
@pytest.mark.parametrize(
    ("count", "classes"),
    [
        *[(1, 1), (1, 7), (8, 4), (9, 4), (8, 5), (14, 32), (16, 32), (16, 33), (30, 80), (32, 80), (31, 83)],
        *[(64, 32), (65, 31), (1, 853), (2, 1024), (2, 1025)],
    ],
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_held_by_a_thread_or_a_block(device, operator, count, classes, values, positions):
    for rows in (3, 40 if count * classes < 600 else 1):
        shape = (1, classes, rows) if positions else (rows, classes)
        weights = {"weights": (shape[0], 1, 1)[: len(shape)]} if operator in MIXES else {}
        ensemble_cases.check_rows(operator, count, shape, device, values=values, **weights)


@pytest.mark.parametrize(("count", "classes"), [(5, 4), (20, 10), (20, 100)])
def test_who_has_weight_zero_may_hold_anything(device: torch.device, count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(count)
    weights = torch.rand(count, generator=generator)
    weights[[0, -2]] = 0
    for bad in (math.nan, math.inf, -math.inf):
        stacks = []
        for filled in (0.0, bad):
            stack = torch.randn(count, 7, classes, generator=generator.manual_seed(1))
            stack[0], stack[-2] = filled, filled
            stacks.append(stack.to(device).requires_grad_())
        student, given = torch.randn(7, classes, device=device), weights.to(device)
        losses = [
            (
                *(ops.js_div(x, given), *ops.consensus(x, given)),
                *(ops.ensemble_kl(student, x, given, 2.0, **how) for how, _ in MIXES.values()),
            )
            for x in stacks
        ]
        assert losses[0] == losses[1]
        clean, spoiled = (torch.autograd.grad(sum(loss), x)[0] for loss, x in zip(losses, stacks, strict=True))
        assert torch.equal(clean, spoiled)
        assert not spoiled[[0, -2]].any()


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
def test_nearly_equal_distributions_keep_their_digits(device: torch.device, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(7, 50, generator=generator)
    teachers = student + scale * torch.randn(5, 7, 50, generator=generator)
    loss = ops.js_div(teachers.to(device), reduction="none").cpu()
    expected = js_reference(teachers.double(), None, 0)
    assert ((loss - expected).abs() / expected).max() < 2e-5
    for how, mix in MIXES.values():
        settings: dict[str, Any] = {"reduction": "none", **how}
        loss = ops.ensemble_kl(student.to(device), teachers.to(device), None, **settings).cpu()
        expected = ensemble_reference(student.double(), teachers.double(), None, None, 1.0, mix, False, 0)
        assert ((loss - expected).abs() / expected).max() < (2e-5 if mix == PROBS else 1e-6 / scale)
    equal = teachers[:1].expand(5, -1, -1).to(device)
    assert ops.js_div(equal, reduction="none").abs().max() < 1e-12


def test_weights_of_other_dtypes_than_the_logits(device: torch.device) -> None:
    ensemble_cases.compare_dtypes_of_weights("cuda", device)


@pytest.mark.parametrize("difference", [*ensemble_cases.DIFFERENCES, 1e3])
@pytest.mark.parametrize("classes", [2, 40, 1030])
def test_masks_that_leave_little_mass(device: torch.device, classes: int, difference: float) -> None:
    """A thread, a warp and a block compute the rows.

    1e3 is too much for fp64 as well.
    """
    ensemble_cases.compare_little_mass("cuda", difference, classes, rows=5, device=device)


@pytest.mark.parametrize("settings", [{"dtype": torch.float64}, {"log_probs": True}, {"temperature": 2.0}], ids=str)
def test_little_mass_in_other_ways(device: torch.device, settings: dict[str, Any]) -> None:
    for difference in (30.0, 200.0, 1e4):
        ensemble_cases.compare_little_mass("cuda", difference, classes=6, rows=5, device=device, **settings)


@pytest.mark.parametrize("scale", [10.0, 20.0])
def test_masks_on_teachers_who_are_sure(device: torch.device, scale: float) -> None:
    ensemble_cases.compare_random_masks("cuda", scale, rows=100, device=device)


@pytest.mark.parametrize("classes", [100, 2100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", range(1, 8))
def test_the_students_gradient_has_every_teacher(device, count, dtype, classes):
    """Some numbers of teachers are read in several parts, and the gradient covers more than the last part."""
    draw = torch.Generator().manual_seed(count)
    student, teachers = (torch.randn(*shape, classes, generator=draw).to(dtype) for shape in ((3,), (count, 3)))
    weights = torch.arange(1.0, count + 1)

    def gradient(*given: Tensor) -> Tensor:
        leaf = given[0].detach().requires_grad_()
        ops.ensemble_kl(leaf, *given[1:], 2.0, mode="mean_of_kl").backward()
        assert leaf.grad is not None
        return leaf.grad

    got = gradient(student.to(device), teachers.to(device), weights.to(device))
    with ops.use_backend("reference"):
        expected = gradient(student.double(), teachers.double(), weights.double())
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        got.double().cpu(), expected, rtol=0, atol=scale * (1e-2 if dtype.itemsize == 2 else 1e-5)
    )


# By a thread each, by blocks, by warps, by blocks for long rows: several blocks of each.
@pytest.mark.parametrize(("count", "classes", "rows"), [(5, 4, 600), (20, 10, 9), (3, 200, 40), (2, 1030, 5)])
@pytest.mark.parametrize("held", [0.0, -1.0, math.nan])
def test_totals_whatever_the_memory_held(device, monkeypatch, count, classes, rows, held):
    """Blocks count in an uncleared word of the workspace how many are done, and a second call finds it used."""
    memory: dict[Any, Tensor] = {}

    def old(*size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        if dtype is not torch.float64:
            return torch.empty(*size, dtype=dtype, device=device)
        if size not in memory:
            memory[size] = torch.full((size[0],), held, dtype=dtype, device=device)
        return memory[size]

    monkeypatch.setattr("fedkern.ops._distill.kernels._empty", old)
    generator = torch.Generator().manual_seed(rows)
    teachers = torch.randn(count + 1, rows, classes, generator=generator).to(device)
    student, teachers = teachers[0], teachers[1:]

    def losses(reduction: str) -> list[Tensor]:
        of_student = [ops.ensemble_kl(student, teachers, reduction=reduction, **how) for how, _ in MIXES.values()]
        return [ops.js_div(teachers, reduction=reduction), *ops.consensus(teachers, reduction=reduction), *of_student]

    totals, again = losses("sum"), losses("sum")
    assert totals == again
    for total, parts in zip(totals, losses("none"), strict=True):
        torch.testing.assert_close(total.double(), parts.double().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("count", "classes", "rows"), [(20, 10, 9), (3, 200, 40), (2, 1030, 5)])
def test_the_students_gradient_is_there_after_the_forward_pass(device, mix, count, classes, rows):
    generator = torch.Generator().manual_seed(rows)
    teachers = torch.randn(count, rows, classes, generator=generator)
    student = torch.randn(rows, classes, generator=generator, requires_grad=True)
    with ops.use_backend("reference"):
        loss = ops.ensemble_kl(student.double(), teachers.double(), None, 2.0, **MIXES[mix][0])
        (expected,) = torch.autograd.grad(3 * loss, student)
    teachers = teachers.to(device)
    leaf = student.detach().to(device).requires_grad_()
    loss = ops.ensemble_kl(leaf, teachers, None, 2.0, **MIXES[mix][0])
    teachers.data.fill_(math.nan)  # they are not read again
    (before,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (last,) = torch.autograd.grad(3 * loss, leaf)
    assert torch.equal(before, last)
    assert torch.equal(3 * once, last)  # the last pass may change what was saved, not what was handed out
    torch.testing.assert_close(before.cpu(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("mix", MIXES)
def test_a_loss_scale_lifts_gradients_of_16_bits(device: torch.device, mix: str) -> None:
    """Gradients without a scale are multiples of 6e-8, as they would be in the forward pass."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(512, 10, generator=generator).half()
    teachers = (student + 1e-2 * torch.randn(3, 512, 10, generator=generator)).half()

    def gradient(student: Tensor, teachers: Tensor) -> Tensor:
        leaf = student.detach().requires_grad_()
        loss = ops.ensemble_kl(leaf, teachers, **MIXES[mix][0])
        return torch.autograd.grad(2.0**15 * loss, leaf)[0].double().cpu()

    got = gradient(student.to(device), teachers.to(device))
    with ops.use_backend("reference"):
        expected = gradient(student.double(), teachers.double())
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-4 * float(expected.abs().max()))


# By a thread each, by warps, by blocks for long rows.
@pytest.mark.parametrize(
    ("count", "classes", "rows", "positions"), [(70, 40, 9, True), (6, 500, 9, False), (3, 1030, 6, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", ["js_div", "consensus"])
def test_rows_keep_what_their_gradients_have_in_common(device, operator, dtype, count, classes, rows, positions):
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(count, rows, classes, generator=generator)
    values[:, ::3] = values[:1, ::3] + 1e-2 * values[:, ::3]  # js_div of these is found in fp64
    stacked = values.to(dtype).to(device)
    logits = stacked.unflatten(1, (-1, 3)).mT.contiguous() if positions else stacked
    weights = torch.rand(count, generator=generator)
    weights[1] = 0

    def call(stack: Tensor, weights: Tensor) -> Tensor:
        results = getattr(ops, operator)(stack, weights, reduction="none")
        return results if isinstance(results, Tensor) else torch.stack(results)

    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        if x.dtype is torch.float32 and x.dim() == logits.dim() - 1 and x.shape[1] == 4 * count:
            kept.append(x)
        return x

    leaf = logits.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = call(leaf, weights.to(device))
    factors = torch.rand(results.shape, generator=generator).to(device, dtype)
    (got,) = torch.autograd.grad(results, leaf, factors, retain_graph=True)
    exact = logits.detach().double().cpu().requires_grad_()
    with ops.use_backend("reference"):
        (expected,) = torch.autograd.grad(call(exact, weights.double()), exact, factors.double().cpu())
    assert_close("gradient", got.cpu(), expected, absolute=2e-6)
    (numbers,) = kept
    numbers.fill_(math.nan)
    (spoiled,) = torch.autograd.grad(results, leaf, factors)
    assert spoiled[0].isnan().all(), "nothing of it was read"
    assert not spoiled[1].any()
