"""Tests of kl_div, dual_kl and entropy beyond numbers: gradients, transforms, masks, and temperatures to infinity."""

import math
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._distill.reference import kl_div_reference
from python_tests.ops._distill.ensemble_cases import MIXES, logits
from python_tests.ops._distill.finite_masks import CALLS, compare
from python_tests.ops.operator_cases import DTYPES, assert_close, needs_core, using

# --- gradients


@needs_core
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


# -- finite masks ------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_finite_masks_count_as_infinite_ones(backend: str, call: str, dtype: torch.dtype) -> None:
    compare(call, dtype, torch.device("cpu"))


@pytest.mark.parametrize("number", [torch.finfo(torch.float32).min, -1e30, -1e9, -1e4])
def test_a_mask_of_the_student_may_be_infinite_where_the_teachers_is_finite(backend: str, number: float) -> None:
    student, teacher = torch.zeros(1, 8), torch.zeros(1, 8)
    student[0, 2:] = -math.inf
    teacher[0, 1:] = number
    for loss in (
        ops.kl_div(student, teacher),
        ops.ensemble_kl(student, teacher.expand(3, 1, 8)),
        ops.ensemble_kl(student, teacher.expand(3, 1, 8), mix="logits"),
        ops.ensemble_kl(student, teacher.expand(3, 1, 8), mode="mean_of_kl"),
        ops.dual_kl(student, student, teacher) / 2,
    ):
        torch.testing.assert_close(loss, torch.tensor(math.log(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_the_limit_a_finite_mask_is_a_number(backend: str, dtype: torch.dtype) -> None:
    """The loss is half a variance over the other classes where both rows are masked, and past all numbers for one."""
    student, teacher = logits(2, 3, 8, dtype=dtype)
    wanted = 0.5 * torch.where(torch.arange(8) < 5, teacher - student, 0).var(1, unbiased=False).mean()
    for number in (torch.finfo(dtype).min, -1e30):
        unmasked, masked, masked_student = teacher.clone(), teacher.clone(), student.clone()
        for x in (masked, masked_student):
            x[:, 5:] = number
        for loss in (
            lambda s, t: ops.kl_div(s, t, math.inf),
            lambda s, t: ops.ensemble_kl(s, torch.stack([t, t]), None, math.inf),
            lambda s, t: ops.ensemble_kl(s, torch.stack([t, t]), None, math.inf, mix="logits"),
            lambda s, t: ops.ensemble_kl(s, torch.stack([t, t]), None, math.inf, mode="mean_of_kl"),
        ):
            torch.testing.assert_close(loss(masked_student, masked), wanted)
            for value in (loss(student, masked), loss(masked_student, unmasked)):
                assert value == math.inf or (dtype is torch.float64 and value > 1e58)


# -- large temperature -------------------------------------------------------------------------------------------------


SHARES = (0.125, 0.375, 0.5)
KL_CALLS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl_div": lambda s, t, T: ops.kl_div(s, t[0], T),
    "student": lambda s, t, T: ops.dual_kl(s, s, t[0], T, direction="student") / 2,
    **{
        name: lambda s, t, T, how=how: ops.ensemble_kl(s, t, s.new_tensor(SHARES), T, **how)
        for name, (how, _) in MIXES.items()
    },
}


def _exact(call: str, student: Tensor, teachers: Tensor, temperature: float) -> float:
    """Return T² KL with 150 digits."""
    with localcontext() as context:
        context.prec = 150
        # Of the limit: a temperature that is as good as infinite.
        T = Decimal(temperature if temperature < math.inf else 1e60)

        def softmax(logits: Sequence[Decimal]) -> list[Decimal]:
            powers = [(x / T).exp() for x in logits]
            return [x / sum(powers) for x in powers]

        def divergence(p: Sequence[Decimal], q: Sequence[Decimal]) -> Decimal:
            return sum((a * (a / b).ln() for a, b in zip(p, q, strict=True)), Decimal(0)) * T * T

        q = [Decimal(x) for x in student.flatten().tolist()]
        stack = [[Decimal(x) for x in row.flatten().tolist()] for row in teachers]
        shares = [Decimal(x) for x in SHARES]
        if call == "student":
            return float(divergence(softmax(q), softmax(stack[0])))
        if call == "kl_div":
            return float(divergence(softmax(stack[0]), softmax(q)))
        if call == "mean":
            return float(sum(w * divergence(softmax(x), softmax(q)) for w, x in zip(shares, stack, strict=True)))
        rows = [softmax(x) for x in stack] if call == "probs" else stack
        mixture = [sum(w * x for w, x in zip(shares, terms, strict=True)) for terms in zip(*rows, strict=True)]
        return float(divergence(mixture if call == "probs" else softmax(mixture), softmax(q)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("call", KL_CALLS)
def test_every_temperature_keeps_its_digits(backend: str, call: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(1, 4, generator=generator, dtype=dtype) * 3
    teachers = torch.randn(3, 1, 4, generator=generator, dtype=dtype) * 3
    for temperature in (1.0, 30.0, 63.0, 65.0, 1e3, 1e6, 1e9, 1e14, 1e30, 1e38, 1e50, math.inf):
        loss = KL_CALLS[call](student, teachers, temperature)
        assert loss.item() == pytest.approx(
            _exact(call, student, teachers, temperature), rel=1e-5 if dtype is torch.float32 else 1e-13
        )


@pytest.mark.parametrize("call", KL_CALLS)
def test_gradients_keep_their_digits(backend: str, call: str) -> None:
    """The gradients are those of the limit, less than 1e-7 away at such temperatures."""
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(shape, generator=generator) for shape in ((5, 20), (3, 5, 20))]

    def gradients(tensors: Sequence[Tensor], temperature: float) -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in tensors]
        return torch.autograd.grad(KL_CALLS[call](*inputs, temperature), inputs)

    for temperature in (1e8, 1e30):
        limit = gradients([x.double() for x in tensors], math.inf)
        for got, expected in zip(gradients(tensors, temperature), limit, strict=True):
            assert_close(call, got, expected)


def test_a_large_temperature_takes_masks_weights_and_16_bits(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(4, 9, generator=generator).bfloat16() for _ in range(2))
    teacher[:, 5:] = torch.finfo(torch.bfloat16).min
    student[:, 7:] = -math.inf
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0])
    student[0] = math.nan
    for temperature in (100.0, 1e4):
        loss = ops.kl_div(student, teacher, temperature, weight=weight, reduction="none")
        log_p, log_q = ((x.double() / temperature).log_softmax(1) for x in (teacher, student))
        exact = weight * temperature**2 * (log_p.exp() * (log_p - log_q))[:, :5].sum(1)
        assert loss.dtype is torch.bfloat16
        assert_close("loss", loss[1:], exact[1:])
        assert loss[0] == 0


def test_classes_that_a_teacher_does_not_know(backend: str) -> None:
    generator = torch.Generator().manual_seed(4)
    student, teachers = (torch.randn(shape, generator=generator) for shape in ((4, 9), (3, 4, 9)))
    known = torch.rand(3, 9, generator=generator) < 0.6
    known[0, :] = True
    known[1, 3] = True
    for temperature in (100.0, 1e3):
        loss = ops.ensemble_kl(student, teachers, None, temperature, class_mask=known)
        share = (known / known.sum(0)).double()[:, None]
        mixture = (share * (teachers.double() / temperature).softmax(2)).sum(0)
        log_p, log_q = (mixture / mixture.sum(1, keepdim=True)).log(), (student.double() / temperature).log_softmax(1)
        assert_close("loss", loss, temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean(), absolute=1e-5)


def test_a_large_temperature_in_transforms(backend: str) -> None:
    """Mapped and compiled calls take the torch.library operators."""
    student, teacher = torch.randn(3, 4, 9), torch.randn(3, 4, 9)
    for loss in (
        lambda s, t: ops.kl_div(s, t, 1e20, reduction="sum"),
        lambda s, t: ops.ensemble_kl(s, torch.stack([t, t]), None, 1e20, reduction="sum"),
    ):
        mapped = torch.func.vmap(torch.func.grad(loss))(student, teacher)
        gradients = torch.stack([torch.func.grad(loss)(s, t) for s, t in zip(student, teacher, strict=True)])
        torch.testing.assert_close(mapped, gradients)
        difference = student - teacher
        torch.testing.assert_close(gradients, (difference - difference.mean(2, keepdim=True)) / 9)
