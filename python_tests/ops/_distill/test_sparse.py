"""Tests of kl_div against stored teachers (values, indices): kernels, gradients, ties, edges and refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from fedkern import ops
from fedkern.ops._distill.reference import kl_div_reference
from fedkern.ops._distill.sparse import fill_classes
from python_tests.ops import differential, operator_cases
from python_tests.ops._distill.ensemble_cases import logits

Case = dict[str, Any]
AXES: Case = {
    "shape": ([401, 3], [33, 10], [7, 129], [65, 100], [1, 3200], [3, 40, 5], [2, 101, 4, 3], [0, 7]),
    "kept": (1, 2, 7, 8, 64, math.inf), "dtype": operator_cases.DTYPES, "rest": ("renormalise", "spread"),
    "temperature": (0.5, 1.0, 4.0, 100.0, math.inf), "reduction": ("none", "sum", "batchmean"),
    "layout": ("contiguous", "permuted", "strided", "offset", "channels_last"), "near": (False, True),
    "weight": (None, "rows", "zeros"), "special": (None, "extreme", "masked"),
}  # fmt: skip
CASES = operator_cases.pairwise(AXES, seed=3)


def make_inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return student, values, indices and weight of a case."""
    generator = torch.Generator().manual_seed(seed)
    (student, noise), classes = torch.randn(2, *case["shape"], generator=generator), case["shape"][1]
    teacher = student + 1e-3 * noise if case["near"] else 2 * noise
    if case["special"] == "extreme":
        teacher[:, 0], teacher[:, -1], student[:, classes // 2] = 1e4, -1e4, 1e4
    if case["special"] == "masked":
        teacher, student = (differential.mask_classes(x, 0.3, 1) for x in (teacher, student))
    if case["rest"] == "spread":
        teacher = teacher.log_softmax(1)
    values, indices = teacher.topk(int(min(case["kept"], classes)), 1)
    mixed = torch.randperm(values.shape[1], generator=generator)
    weight = None
    if case["weight"]:
        weight = torch.rand(case["shape"][:1], generator=generator) + 0.5
        weight = weight.masked_fill(weight < 1, 0) if case["weight"] == "zeros" else weight
    laid = (differential._laid_out(x, case["layout"], generator) for x in (student, values[:, mixed]))
    student, values = (x.to(case["dtype"]) for x in laid)
    return student, values, indices[:, mixed], weight


@pytest.mark.sampled(48)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_against_float64(backend: str, number: int) -> None:
    case = CASES[number]
    student, values, indices, weight = make_inputs(case, seed=number)
    leaf, exact = student.requires_grad_(), student.detach().double().requires_grad_()
    temperature, settings = case["temperature"], {"weight": weight, "reduction": case["reduction"]}
    loss = ops.kl_div(leaf, (values, indices), temperature, rest=case["rest"], **settings)
    full = fill_classes(values.double(), indices, student.shape[1], case["rest"])
    expected = kl_div_reference(exact, full, temperature, **settings)
    assert loss.dtype == student.dtype
    assert not (loss < 0).any()
    size = differential.spread(student, values) * differential.times(temperature)
    count = max(1, len(student)) if case["reduction"] == "sum" else 1
    limits = {"absolute": 1e-6 * size * count * (size if temperature == math.inf else 1), "gradient": 2e-6 * size}
    differential.compare([loss], [expected], {"student": (leaf, exact)}, coarse=leaf.dtype != torch.float64, **limits)


def test_every_class_of_a_teacher_is_filled_by_its_rule() -> None:
    values, indices = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[3, 1]])
    full = fill_classes(values, indices, 6, "spread").exp()
    torch.testing.assert_close(full, torch.tensor([[0.05, 0.3, 0.05, 0.5, 0.05, 0.05]]))
    full = fill_classes(values, indices, 6, "renormalise").softmax(1)
    torch.testing.assert_close(full, torch.tensor([[0, 0.375, 0, 0.625, 0, 0]]))
    assert fill_classes(torch.zeros(1, 2), indices, 4, "spread")[0, 0] == -math.inf  # nothing is left


@pytest.mark.parametrize("remainder", ["renormalise", "spread"])
def test_gradients_by_autograd_and_by_differences(backend: str, remainder: str) -> None:
    student, teacher = logits(2, 5, 9, dtype=torch.float64)
    stored = teacher.log_softmax(1).topk(3)
    student.requires_grad_()
    weight = torch.rand(5, dtype=torch.float64)
    for temperature in (1.0, 3.0):
        for reduction in ("none", "batchmean"):
            settings: dict[str, Any] = {"reduction": reduction, "rest": remainder}

            def loss(x: Tensor) -> Tensor:
                return ops.kl_div(x, stored, temperature, weight=weight, **settings)  # noqa: B023

            assert torch.autograd.gradcheck(loss, student)
            assert torch.autograd.gradgradcheck(loss, student)
    p = torch.zeros(5, 9, dtype=torch.float64).scatter(1, stored.indices, stored.values.exp())
    if remainder == "spread":
        p = torch.where(p == 0, (1 - p.sum(1, keepdim=True)) / 6, p)
    expected = kl_div(log_softmax(student, 1), p / p.sum(1, keepdim=True), reduction="batchmean")
    torch.testing.assert_close(ops.kl_div(student, stored, rest=remainder), expected)


def test_all_classes_are_the_teacher(backend: str) -> None:
    student, teacher = logits(2, 33, 40)
    expected = kl_div_reference(student.double(), teacher.double(), 2.0)
    for name in AXES["rest"]:
        stored = teacher.log_softmax(1).sort(1, descending=True)
        operator_cases.assert_close(name, ops.kl_div(student, stored, 2.0, rest=name), expected)
    equal = ops.kl_div(student, student.sort(1), 2.0, reduction="none")
    assert equal.max() < 1e-9
    assert (equal >= 0).all()


def test_one_class_is_cross_entropy(backend: str) -> None:
    student, labels = logits(50, 100), torch.arange(50)[:, None]
    expected = torch.nn.functional.cross_entropy(student.double(), labels[:, 0])
    for values, name in ((torch.full((50, 1), 7.0), "renormalise"), (torch.zeros(50, 1), "spread")):
        operator_cases.assert_close(name, ops.kl_div(student, (values, labels), rest=name), expected)


def test_order_ties_and_types_of_indices_change_nothing(backend: str) -> None:
    student, teacher = logits(2, 40, 30)
    teacher[:, 5:9] = teacher[:, 4:5]
    values, indices = teacher.topk(8)
    expected = ops.kl_div(student, (values, indices), 2.0)
    for kind in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(ops.kl_div(student, (values, indices.to(kind)), 2.0), expected)
    torch.testing.assert_close(ops.kl_div(student, (values.flip(1), indices.flip(1)), 2.0), expected)


def test_sixteen_bit_values_beside_a_float32_student(backend: str) -> None:
    student, teacher = logits(2, 65, 100)
    values, indices = teacher.log_softmax(1).topk(8)
    for dtype in (torch.bfloat16, torch.float16):
        leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
        loss = ops.kl_div(leaf, (values.to(dtype), indices), 2.0, rest="spread")
        full = fill_classes(values.to(dtype).double(), indices, 100, "spread")
        expected = kl_div_reference(exact, full, 2.0)
        loss.backward(), expected.backward()
        operator_cases.assert_close("loss", loss, expected)
        operator_cases.assert_close("gradient", leaf.grad, exact.grad)


def test_words_have_their_classes_last(backend: str) -> None:
    student, teacher = logits(2, 3, 5, 40)
    stored = teacher.topk(4)
    per_word = ops.kl_div(student, stored, 2.0, reduction="none", dim=-1)
    flat = tuple(x.flatten(0, 1) for x in stored)
    torch.testing.assert_close(per_word.flatten(), ops.kl_div(student.flatten(0, 1), flat, 2.0, reduction="none"))


def test_threads_change_no_bit() -> None:
    student, teacher = logits(2, 4096, 100)
    losses = set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            losses.add(float(ops.kl_div(student, teacher.topk(8), 2.0)))
    finally:
        torch.set_num_threads(before)
    assert len(losses) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"indices": torch.tensor([[0, 7]] * 3)}, "indices must be classes from 0 to 6, but hold 7"),
        ({"indices": torch.tensor([[-1, 2]] * 3)}, "indices must be classes from 0 to 6, but hold -1"),
        (
            {"indices": torch.tensor([[0, 1], [4, 4], [0, 1]])},
            "indices must be different classes in every row, but hold class 4 twice in one",
        ),
        ({"indices": torch.ones(3, 2)}, "indices must have a whole-number dtype such as int64, but has torch.float32"),
        ({"indices": torch.ones(3, 1).long()}, r"indices must have the shape \[3, 2\] of values, but has \[3, 1\]"),
        (
            {"values": torch.ones(2, 2)},
            r"values must have the student's shape \[3, 7\] with 1 to 7 classes .* \[2, 2\]",
        ),
        ({"values": torch.ones(3, 8)}, r"values must .* but has \[3, 8\]"),
        ({"values": torch.ones(3, 0)}, r"values must .* but has \[3, 0\]"),
        ({"values": torch.ones(3, 2, requires_grad=True)}, r"a teacher \(values, indices\) gets no gradient: detach"),
        (
            {"values": torch.tensor([[math.nan, -1.0], [1.5, -1.0], [-1.0, -1.0]]), "rest": "spread"},
            'values must be log-probabilities with rest="spread", so at most 0, but reach 1.5',
        ),
        (
            {"values": torch.full((3, 2), 1.5), "rest": "spread"},
            'values must be log-probabilities with rest="spread", so at most 0, but reach 1.5',
        ),
        ({"rest": "drop"}, 'rest must be "renormalise" or "spread", but is \'drop\''),
    ],
)
def test_mistakes_are_named(backend: str, change: Case, said: str) -> None:
    given = {"values": torch.zeros(3, 2), "indices": torch.tensor([[0, 1]] * 3), "rest": "renormalise", **change}
    student = torch.zeros(3, 7, requires_grad=True)
    for temperature in (1.0, 100.0):
        with pytest.raises((ValueError, TypeError), match=said):
            ops.kl_div(student, (given["values"], given["indices"]), temperature, rest=given["rest"])


def test_teachers_of_another_form_are_refused() -> None:
    student = torch.zeros(3, 7)
    with pytest.raises(TypeError, match=r"teacher must be a tensor of logits, or a tuple \(values, indices\)"):
        ops.kl_div(student, (student,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rest is for a teacher \(values, indices\), and this one has all logits"):
        ops.kl_div(student, student, rest="spread")
