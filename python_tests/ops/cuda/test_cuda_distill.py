"""Tests of kl_div, dual_kl and entropy on CUDA at the sizes where other kernels take over, and of what is kept."""

import math

import pytest
import torch

from fedkern import ops
from fedkern.ops._core import backend
from fedkern.ops._distill.kernels import DistillKernels, Divergence, entropy_call
from fedkern.ops._distill.reference import entropy_reference, kl_div_reference
from python_tests.ops import differential
from python_tests.ops._distill import test_kl
from python_tests.ops._distill.finite_masks import CALLS as CALLS_OF_MASKS
from python_tests.ops._distill.finite_masks import compare as compare_masks
from python_tests.ops.operator_cases import DTYPES, assert_close

OPERATORS = {"kl_div": ("student", "teacher"), "dual_kl": ("a", "b", "teacher"), "entropy": ("logits",)}


def check(device, operator, dtype, rows, classes, reduction="batchmean", weighted=True):
    numbers = {"shape": [rows, classes], "dtype": dtype, "values": "normal", "layout": "contiguous", "grad": True}
    case = {name: {**numbers, "seed": classes + k} for k, name in enumerate(OPERATORS[operator])}
    case |= {"reduction": reduction, "dim": 1, "_stacked": False}
    if operator != "entropy":
        weight = {**numbers, "shape": [rows], "dtype": "float32", "values": "weights", "seed": 1} if weighted else None
        case |= {"temperature": 2.0, "weight": weight, "_mask": 0.3, "_everywhere": True, "_same": False}
    for direction in ("teacher", "student") if operator == "dual_kl" else (None,):
        differential.check(operator, case | ({"direction": direction} if direction else {}), device)


# Classes up to which some threads take a row, or hold it, and one more; 20 rows are many for the emulated device.
EDGES = (4, 5, 16, 17, 32, 33, 128, 129, 512, 513, 1024, 1025, 4096, 4097)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("classes", EDGES)
def test_classes_at_which_other_threads_take_a_row(device, classes, operator, dtype):
    for rows in (1, 20 if classes < 1026 else 2):
        check(device, operator, dtype, rows, classes, weighted=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("students", [0, 1, 2])
@pytest.mark.parametrize("classes", [3, 10, 24, 100, 300, 700, 3000, 5000, 9001])
def test_what_the_forward_pass_kept_changes_no_bit(device, classes, students, reverse, dtype):
    """One row has weight 0 and unknown contents."""
    generator = torch.Generator().manual_seed(classes)
    teacher, *given = (
        torch.randn(20 if classes < 1000 else 2, classes, generator=generator).to(device, dtype) for _ in range(3)
    )
    rows = len(teacher)
    weight = torch.rand(rows, generator=generator).to(device)
    weight[1] = 0
    teacher[1] = math.nan
    kernel = backend.select("kl_div", teacher)
    grad = torch.rand(rows, generator=generator).to(device, dtype)
    if not students:
        if reverse:
            return
        call, needs = entropy_call(teacher, 0), (False, False, True, False)
        kept = kernel.divergence_statistics(call).fill_(math.nan)
        assert torch.equal(kernel.divergence_forward(call, statistics=kept)[2:], kernel.divergence_forward(call)[2:])
        both_gradients = (kernel.divergence_backward((grad,), call, needs, x)[2] for x in (None, kept))
        plain, kept = (gradient[torch.arange(rows) != 1] for gradient in both_gradients)
        assert torch.equal(plain, kept)
        return
    call = Divergence(given[0], given[1] if students == 2 else None, teacher, weight, 2.0, reverse, 0)
    kept = kernel.divergence_statistics(call).fill_(math.nan)
    assert torch.equal(kernel.divergence_forward(call, statistics=kept), kernel.divergence_forward(call))
    for needs in ((True, True, True, False), (True, True, False, False), (False, False, True, False)):
        plain, short = (kernel.divergence_backward((grad,), call, needs, x) for x in (None, kept))
        for x, y in zip(plain, short, strict=True):
            assert (x is None) == (y is None)
            assert x is None or (torch.equal(x, y) and not x[1].any())


def test_gradients_of_logits_alone_are_kept_for(device: torch.device) -> None:
    logits, teacher = torch.randn(7, 10, device=device, requires_grad=True), torch.randn(7, 10, device=device)
    weight = torch.rand(7, device=device, requires_grad=True)
    for loss, numbers in (
        (ops.kl_div(logits, teacher), 6),
        (ops.dual_kl(logits, logits, teacher, weight=weight.detach(), reduction="none"), 10),
        (ops.entropy(logits), 3),
        (ops.kl_div(logits, teacher, weight=weight), None),
        (ops.kl_div(logits, teacher, math.inf), None),
    ):
        *_, kept = loss.grad_fn.saved_tensors
        assert (None if kept is None else kept.numel()) == (numbers and 7 * numbers)


@pytest.mark.parametrize("offset", [20.0, 5e3, -5e3])
@pytest.mark.parametrize("shifted", ["teacher", "student"])
@pytest.mark.parametrize("classes", [3, 100])
def test_rows_that_lie_far_apart_keep_their_digits(device, classes, shifted, offset):
    test_kl.compare_rows_far_apart("cuda", device, classes, shifted, offset)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("dtype", "classes"), [("float32", 20_000), ("bfloat16", 8200), ("float32", 9001)])
def test_few_long_rows_are_shared_between_blocks(device, operator, dtype, classes):
    for reduction in ("batchmean", "none"):
        check(device, operator, dtype, 2, classes, reduction)


@pytest.mark.parametrize("held", [0.0, -1.0, math.nan])
@pytest.mark.parametrize(("rows", "classes"), [(300, 10), (90, 100), (17, 5000), (2, 9001)])
def test_a_total_does_not_depend_on_what_its_memory_held(device, monkeypatch, rows, classes, held):
    """Blocks count in that memory without clearing it first.

    A recorded launch finds its own earlier counts.
    """
    generator = torch.Generator().manual_seed(rows)
    student, teacher = (torch.randn(rows, classes, generator=generator).to(device) for _ in range(2))
    expected = [ops.kl_div(student, teacher), ops.entropy(student)]
    assert_close("loss", expected[0].cpu(), ops.kl_div(student, teacher, reduction="none").cpu().double().mean())
    size = backend.select("kl_div", student).core.distill_workspace
    memory = torch.full((size,), held, dtype=torch.float64, device=device)
    monkeypatch.setattr(DistillKernels, "_space", lambda *_: memory)
    for _ in range(2):
        assert torch.equal(ops.kl_div(student, teacher), expected[0])
        assert torch.equal(ops.entropy(student), expected[1])


def test_mixed_dtypes(device: torch.device) -> None:
    student = torch.randn(9, 264, device=device).bfloat16().requires_grad_()
    for dtype in (torch.float32, torch.float16, torch.float64):
        teacher = torch.randn(9, 264, device=device).to(dtype).requires_grad_()
        exact = [x.detach().cpu().double().requires_grad_() for x in (student, teacher)]
        loss = ops.kl_div(student, teacher, 2.0)
        assert loss.dtype == torch.promote_types(torch.bfloat16, dtype)
        (loss * 3).backward()
        expected = kl_div_reference(*exact, 2.0)
        (expected * 3).backward()
        assert_close("loss", loss.cpu(), expected)
        for ours, theirs in zip((student, teacher), exact, strict=True):
            assert_close("gradient", ours.grad.cpu(), theirs.grad)
        student.grad = None


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
@pytest.mark.parametrize("classes", [3, 10, 200, 1000, 5000])
def test_nearly_equal_rows_keep_their_digits(device: torch.device, classes: int, scale: float) -> None:
    test_kl.compare_nearly_equal(device, classes, scale, 17, 2e-5)
    student = torch.randn(17, classes)
    equal = ops.kl_div(student.to(device), student.to(device), 0.5, reduction="none")
    assert torch.equal(equal.cpu(), torch.zeros(17))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [24, 264, 2056])
def test_nothing_beside_the_gradients_is_written(device: torch.device, dtype: torch.dtype, classes: int) -> None:
    """The offsets allow eight classes at once, or do not.

    The test looks between rows and around the whole.
    """
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(5, classes, generator=generator).to(device, dtype)
    exact = logits.cpu().double().requires_grad_()
    entropy_reference(exact).backward()
    assert exact.grad is not None
    kernel = backend.select("entropy", logits)
    for offset in (0, 1, 7, 8, 16):
        room = torch.full((6 * (classes + 16) + 64,), 777.0, dtype=dtype, device=device)
        gradient = room[offset:].as_strided((5, classes), (classes + 16, 1))
        kernel.divergence_forward(entropy_call(logits, 2), (None, None, gradient))
        assert_close("gradient", gradient.cpu(), exact.grad)
        assert int((room != 777.0).sum()) <= gradient.numel()
        gradient.fill_(777.0)
        assert bool((room == 777.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS_OF_MASKS)
def test_finite_masks_count_as_infinite_ones(device: torch.device, call: str, dtype: torch.dtype) -> None:
    compare_masks(call, dtype, device)
