"""Tests of kl_div, dual_kl and entropy beyond numbers: gradients, transforms, determinism, errors."""

import math

import pytest
import torch

from fedkern import ops
from fedkern.ops._distill.reference import kl_div_reference
from python_tests.ops._distill.ensemble_cases import logits
from python_tests.ops.operator_cases import assert_close, using

# --- gradients


def test_gradient_is_handed_over_without_a_copy() -> None:
    student, teacher = logits(2, 64, 10)
    student.requires_grad_()
    loss = ops.kl_div(student, teacher)
    saved = {x.data_ptr() for x in loss.grad_fn.saved_tensors if x is not None}  # type: ignore[union-attr]
    loss.backward()
    assert student.grad.data_ptr() in saved


def test_a_loss_scale_lifts_float16_gradients() -> None:
    student, teacher = logits(2, 401, 1000, dtype=torch.float16)
    student.requires_grad_()
    (ops.kl_div(student, teacher) * 1024).backward()
    exact = student.detach().double().requires_grad_()
    (kl_div_reference(exact, teacher.double()) * 1024).backward()
    assert_close("scaled gradient", student.grad, exact.grad, absolute=1e-9)


def test_sixteen_bits_beside_float64(backend: str) -> None:
    """Gradients are computed in float64 and narrowed when stored, which Triton's interpreter cannot do in one step."""
    for dtype in (torch.bfloat16, torch.float16):
        a, b, teacher = (x.requires_grad_() for x in logits(3, 4, 7))
        narrow = [a.detach().to(dtype).requires_grad_(), b.detach().to(dtype).requires_grad_()]
        stack = torch.stack([teacher, teacher.flip(1)]).detach()
        for name, call in {
            "kl_div": lambda s, t, _: ops.kl_div(s[0], t[0]),
            "kl_div of the teacher": lambda s, t, _: ops.kl_div(t[0], s[0]),
            "limit": lambda s, t, _: ops.dual_kl(s[0], s[1], t[0], math.inf),
            "dual_kl": lambda s, t, _: ops.dual_kl(*s, t[0], direction="student"),
            "ensemble_kl": lambda s, t, _: ops.ensemble_kl(s[0], t),
            "ensemble_kl of students": lambda s, t, both: ops.ensemble_kl(t[0], both),
            "mean_of_kl": lambda s, t, _: ops.ensemble_kl(s[0], t, mode="mean_of_kl"),
            "mean_of_kl of students": lambda s, t, both: ops.ensemble_kl(t[0], both, mode="mean_of_kl"),
        }.items():
            exact = [x.detach().double().requires_grad_() for x in narrow]
            with using("reference"):
                expected = torch.autograd.grad(
                    call(exact, stack.double(), torch.stack(exact)), exact, allow_unused=True
                )
            got = torch.autograd.grad(call(narrow, stack.double(), torch.stack(narrow)), narrow, allow_unused=True)
            for ours, theirs in zip(got, expected, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    assert_close(f"{name} {dtype}", ours, theirs)


# --- masks, weights, edges


def test_rows_of_weight_zero_count_nothing(backend: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for shape, rows in (((6, 40), (6,)), ((6, 5), (6,)), ((40, 5), (40,)), ((6, 5, 3), (6, 3)), ((6, 5, 3), (6,))):
            a, b, teacher = (x.requires_grad_() for x in logits(3, *shape))
            weight = torch.rand(rows) + 0.5
            weight[2] = 0
            weight.requires_grad_()
            clean = ops.dual_kl(a, b, teacher, 2.0, weight=weight, reduction="none")
            spoiled = [x.detach().clone() for x in (a, b, teacher)]
            for x in spoiled:
                x[2] = bad
                x.requires_grad_()
            again = weight.detach().clone().requires_grad_()
            for reduction in ("none", "sum"):
                loss = ops.dual_kl(*spoiled, 2.0, weight=again, reduction=reduction)
                if reduction == "none":
                    assert torch.equal(loss, clean)
                    assert (loss[2] == 0).all()
                loss.sum().backward()
            clean.sum().backward()
            for x, y in zip((*spoiled, again), (a, b, teacher, weight), strict=True):
                assert y.grad is not None
                assert (x.grad[2] == 0).all()
                torch.testing.assert_close(x.grad, 2 * y.grad, rtol=1e-5, atol=1e-6)


def test_masked_classes(backend: str) -> None:
    student, teacher = logits(2, 33, 40)
    teacher[:, 7:9] = -math.inf
    student.requires_grad_()
    teacher.requires_grad_()
    loss = ops.kl_div(student, teacher, reduction="none")
    assert loss.isfinite().all()
    loss.sum().backward()
    assert (teacher.grad[:, 7:9] == 0).all()
    assert (student.grad[:, 7:9] > 0).all()  # the student spends probability there
    masked = student.detach().clone()
    masked[:, 3] = -math.inf
    assert (ops.kl_div(masked, teacher, reduction="none") == math.inf).all()
    losses = ops.kl_div(masked, teacher, math.inf, reduction="none")
    kept = [c for c in range(40) if c not in (3, 7, 8)]
    expected = 0.5 * (teacher - student)[:, kept].var(1, unbiased=False)
    torch.testing.assert_close(losses, expected)
    assert ops.entropy(masked, reduction="none").isfinite().all()


def test_a_forced_kernel_refuses_a_negated_view(backend: str) -> None:
    student, teacher = logits(2, 12, 10)
    with pytest.raises(RuntimeError, match="negated view") if backend != "reference" else using("reference"):
        ops.kl_div(torch._neg_view(-student), teacher)


# --- errors


def test_wrong_arguments() -> None:
    good, weight = torch.zeros(4, 5), torch.ones(4)
    wrong = {
        ValueError: [
            (r"teacher must have the shape \[4, 5\] of student, but has \[4, 6\]", {"teacher": torch.zeros(4, 6)}),
            (r"student must have shape \[B, C\].*has \[5\]", {"student": torch.zeros(5)}),
            (r"student must have shape.*at least one class.*\[4, 0\]", {"student": torch.zeros(4, 0)}),
            (r"teacher must be on cpu like student, but is on meta", {"teacher": torch.zeros(4, 5, device="meta")}),
            (r"temperature must be above 0.*is 0", {"temperature": 0}),
            (r"temperature must be above 0.*is -1", {"temperature": -1.0}),
            (r"temperature must be above 0.*nan", {"temperature": math.nan}),
            (r'reduction must be "none", "sum" or "batchmean", but is \'mean\'', {"reduction": "mean"}),
            (r"weight must have shape \[4\].*\[3\]", {"weight": torch.ones(3)}),
            (r"dim must be between -2 and 1, not 2", {"dim": 2}),
            (r"teacher must have the shape \[4, 5\] of student, but has \[5, 4\]", {"teacher": good.T, "dim": 0}),
            (r"weight must be on cpu.*meta", {"weight": torch.ones(4, device="meta")}),
        ],
        TypeError: [(r"temperature must be a number.*Tensor", {"temperature": torch.tensor(1.0)})],
    }
    for error, cases in wrong.items():
        for match, arguments in cases:
            with pytest.raises(error, match=match):
                ops.kl_div(**{"student": good, "teacher": good, "weight": weight, **arguments})
    with pytest.raises(ValueError, match=r"weight must have shape \[4\] or \[4, 3\], one value per row, but has \[3\]"):
        ops.kl_div(torch.zeros(4, 5, 3), torch.zeros(4, 5, 3), weight=torch.ones(3))
    with pytest.raises(ValueError, match=r'direction must be "teacher" or "student", but is \'both\''):
        ops.dual_kl(good, good, good, direction="both")
    with pytest.raises(ValueError, match=r"b must have the shape \[4, 5\] of a, but has \[4, 4\]"):
        ops.dual_kl(good, torch.zeros(4, 4), good)


def test_bool_weights_and_whole_temperatures() -> None:
    student, teacher = logits(2, 4, 5)
    mask = torch.tensor([True, False, True, True])
    expected = ops.kl_div(student, teacher, 2.0, weight=mask.float())
    assert torch.equal(ops.kl_div(student, teacher, 2, weight=mask), expected)
