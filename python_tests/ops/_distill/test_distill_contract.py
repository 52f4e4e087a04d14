"""kl_div, dual_kl, entropy: what they promise beyond numbers: gradients, transforms, determinism, errors."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._distill.reference import kl_div_reference
from python_tests.ops._distill.distill_operators import OPERATORS, each_operator, logits
from python_tests.ops.operator_cases import KERNELS, assert_close, using

# --- gradients


@pytest.mark.sampled
@each_operator
@pytest.mark.parametrize(("temperature", "reduction"), [(2.0, "none"), (2.0, "batchmean"), (math.inf, "none")])
def test_gradcheck(backend: str, operator: str, temperature: float, reduction: str) -> None:
    count, call = OPERATORS[operator]
    for shape in ((2, 3), (2, 2, 2)):
        inputs = [x.requires_grad_() for x in logits(count, *shape, dtype=torch.float64)]
        weight = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
        extra = [] if operator == "entropy" else [weight]

        def function(*tensors: Tensor) -> Tensor:
            more: dict[str, Any] = {"weight": tensors[count]} if len(tensors) > count else {}
            return call(tensors[:count], temperature=temperature, reduction=reduction, **more)

        assert torch.autograd.gradcheck(function, (*inputs, *extra))
        if backend in ("reference", *KERNELS[-1:]):  # second derivatives are the reference's on every ISA level
            assert torch.autograd.gradgradcheck(function, (*inputs, *extra), fast_mode=True)


@each_operator
def test_gradients_survive_retained_graphs(operator: str) -> None:
    count, call = OPERATORS[operator]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.requires_grad_() for x in logits(count, 31, 10, dtype=dtype)]
        loss = call(inputs)
        (once,) = torch.autograd.grad(loss, inputs[:1], retain_graph=True)
        kept = once.clone()
        (tripled,) = torch.autograd.grad(loss * 3, inputs[:1], retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        assert torch.equal(once, kept)
        assert inputs[0].grad is not None
        assert torch.equal(inputs[0].grad, kept + kept)
        torch.testing.assert_close(tripled, 3 * kept, rtol=1e-2, atol=1e-6)


def test_gradient_is_handed_over_without_a_copy() -> None:
    student, teacher = logits(2, 64, 10)
    student.requires_grad_()
    loss = ops.kl_div(student, teacher)
    saved = {x.data_ptr() for x in loss.grad_fn.saved_tensors if x is not None}  # type: ignore[union-attr]
    loss.backward()
    assert student.grad is not None
    assert student.grad.data_ptr() in saved


def test_grad_output_of_any_layout(backend: str) -> None:
    student, teacher = logits(2, 6, 5, 3)
    expected = None
    for grad in (
        torch.full((6, 3), 2.0),
        torch.tensor(2.0).expand(6, 3),
        torch.full((3, 6), 2.0).t(),
        torch.full((6, 6), 2.0)[:, ::2],
        torch._neg_view(torch.full((6, 3), -2.0)),
    ):
        leaf = student.clone().requires_grad_()
        ops.kl_div(leaf, teacher, reduction="none").backward(grad)
        expected = leaf.grad if expected is None else expected
        assert torch.equal(leaf.grad, expected)


def test_gradients_batched_over_grad_outputs() -> None:
    for reduction in ("none", "sum"):
        student, teacher = logits(2, 4, 5)
        student.requires_grad_()
        loss = ops.kl_div(student, teacher, reduction=reduction)
        directions = torch.randn(7, *loss.shape)
        (batched,) = torch.autograd.grad(loss, student, directions, is_grads_batched=True, retain_graph=True)
        for direction, got in zip(directions, batched, strict=True):
            (one,) = torch.autograd.grad(loss, student, direction, retain_graph=True)
            torch.testing.assert_close(got, one)


def test_a_loss_scale_lifts_float16_gradients() -> None:
    student, teacher = logits(2, 401, 1000, dtype=torch.float16)
    student.requires_grad_()
    (ops.kl_div(student, teacher) * 1024).backward()
    exact = student.detach().double().requires_grad_()
    (kl_div_reference(exact, teacher.double()) * 1024).backward()
    assert student.grad is not None
    assert exact.grad is not None
    assert_close("scaled gradient", student.grad, exact.grad, absolute=1e-9)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_mixed_dtypes(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = (x.to(d).requires_grad_() for x, d in zip(logits(2, 33, 101), dtypes, strict=True))
    exact = [x.detach().double().requires_grad_() for x in (student, teacher)]
    loss = ops.kl_div(student, teacher, 2.0)
    loss.backward()
    expected = kl_div_reference(exact[0], exact[1], 2.0)
    expected.backward()
    assert loss.dtype is torch.float32
    assert_close("loss", loss, expected)
    for got, x in zip((student, teacher), exact, strict=True):
        assert got.grad is not None
        assert x.grad is not None
        assert got.grad.dtype is got.dtype
        assert_close("gradient", got.grad, x.grad)
    assert ops.kl_div(student.double(), teacher).dtype is torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.kl_div(student, teacher).dtype is torch.float32


def test_sixteen_bits_beside_float64(backend: str) -> None:
    """Computed in float64 and narrowed where a gradient is stored, which Triton's interpreter does not do at once."""
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
                assert x.grad is not None
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
    assert student.grad is not None
    assert teacher.grad is not None
    assert (teacher.grad[:, 7:9] == 0).all()
    assert (student.grad[:, 7:9] > 0).all()  # the student spends probability there
    masked = student.detach().clone()
    masked[:, 3] = -math.inf
    assert (ops.kl_div(masked, teacher, reduction="none") == math.inf).all()
    both = ops.kl_div(masked, teacher, math.inf, reduction="none")
    kept = [c for c in range(40) if c not in (3, 7, 8)]
    expected = 0.5 * (teacher - student)[:, kept].var(1, unbiased=False)
    torch.testing.assert_close(both, expected)
    assert ops.entropy(masked, reduction="none").isfinite().all()


def test_nan_and_infinity_are_passed_on(backend: str) -> None:
    for classes in (5, 40):
        for bad in (math.nan, math.inf):
            student, teacher = logits(2, 20, classes)
            student[3, 4] = bad
            for temperature in (1.0, math.inf):
                loss = ops.kl_div(student, teacher, temperature, reduction="none")
                assert loss[3].isnan()
                assert loss.isnan().sum() == 1
            assert ops.entropy(student, reduction="none").isnan().sum() == 1
        hopeless = torch.full((3, classes), -math.inf)
        assert ops.kl_div(torch.zeros(3, classes), hopeless, reduction="none").isnan().all()


def test_empty_batches(backend: str) -> None:
    for shape in ((0, 5), (0, 5, 3), (4, 5, 0)):
        student, teacher = (torch.zeros(shape, requires_grad=True) for _ in range(2))
        for reduction in ("none", "sum", "batchmean"):
            loss = ops.kl_div(student, teacher, reduction=reduction)
            assert loss.shape == ((shape[0], *shape[2:]) if reduction == "none" else ())
            assert loss.sum() == 0
            loss.sum().backward()
        assert student.grad is not None
        assert student.grad.shape == shape
        assert ops.entropy(student) == 0


def test_one_class_has_no_divergence(backend: str) -> None:
    student, teacher = logits(2, 9, 1)
    for temperature in (1.0, math.inf):
        assert torch.equal(ops.kl_div(student, teacher, temperature, reduction="none"), torch.zeros(9))
    assert torch.equal(ops.entropy(student, reduction="none"), torch.zeros(9))


def test_infinite_temperature_is_the_limit() -> None:
    student, teacher = logits(2, 20, 30, dtype=torch.float64)
    near = ops.kl_div(student, teacher, 1e5, reduction="none")
    torch.testing.assert_close(ops.kl_div(student, teacher, math.inf, reduction="none"), near, rtol=1e-3, atol=0)


def test_input_views_that_pointers_would_misread(backend: str) -> None:
    student, teacher = logits(2, 12, 10)
    expected = ops.kl_div(student, teacher)
    if backend == "reference":
        assert torch.equal(ops.kl_div(torch._neg_view(-student), teacher), expected)
    with pytest.raises(RuntimeError, match="negated view") if backend != "reference" else using("reference"):
        ops.kl_div(torch._neg_view(-student), teacher)
    with torch.random.fork_rng():
        torch.testing.assert_close(
            ops.kl_div(student.expand(12, 10), teacher[:1].expand(12, 10)).isfinite().item(), True
        )
    before = student._version
    ops.kl_div(student, teacher)
    assert student._version == before


@pytest.mark.parametrize("name", KERNELS)
def test_offsets_beyond_32_bits(name: str) -> None:
    stride = 2**31 + 9
    far = torch.empty(stride + 64, dtype=torch.bfloat16)  # only two pages of it are ever touched
    student = far.as_strided((2, 40), (stride, 1))
    values, teacher = logits(2, 2, 40, dtype=torch.bfloat16)
    student.copy_(values)
    with using(name):
        assert torch.equal(
            ops.kl_div(student, teacher, reduction="none"), ops.kl_div(values, teacher, reduction="none")
        )
        across = far.as_strided((40, 2), (1, stride))
        expected = ops.kl_div(across.clone(), teacher.t().contiguous(), reduction="none")
        got = ops.kl_div(across, teacher.t(), reduction="none")
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


# --- determinism


@pytest.mark.sampled(2)
@each_operator
@pytest.mark.parametrize("name", KERNELS)
def test_same_bits_for_every_run_and_thread_count(name: str, operator: str) -> None:
    count, call = OPERATORS[operator]
    before = torch.get_num_threads()
    results = []
    try:
        with using(name):
            for threads in (1, 2, 1, 2):
                torch.set_num_threads(threads)
                for shape in ((2001, 129), (12, 21, 40, 40)):
                    inputs = [x.requires_grad_() for x in logits(count, *shape)]
                    loss = call(inputs, reduction="sum")
                    loss.backward()
                    results.append((shape, loss.detach(), [x.grad for x in inputs]))
    finally:
        torch.set_num_threads(before)
    for shape, loss, gradients in results[2:]:
        _, first, expected = next(r for r in results if r[0] == shape)
        assert torch.equal(loss, first)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_calls_from_several_python_threads() -> None:
    student, teacher = logits(2, 500, 300)
    expected = ops.kl_div(student, teacher)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ops.kl_div(student, teacher), range(32)))
    assert all(torch.equal(x, expected) for x in results)


# --- errors


def test_wrong_arguments() -> None:
    good, weight = torch.zeros(4, 5), torch.ones(4)
    for match, error, arguments in [
        (
            r"teacher must have the shape \[4, 5\] of student, but has \[4, 6\]",
            ValueError,
            {"teacher": torch.zeros(4, 6)},
        ),
        (r"student must have shape \[B, C\].*has \[5\]", ValueError, {"student": torch.zeros(5)}),
        (r"student must have shape.*at least one class.*\[4, 0\]", ValueError, {"student": torch.zeros(4, 0)}),
        (r"teacher must have dtype float32.*torch.int64", TypeError, {"teacher": torch.zeros(4, 5, dtype=torch.int64)}),
        (r"student must have dtype.*complex64", TypeError, {"student": torch.zeros(4, 5, dtype=torch.complex64)}),
        (r"student must be a tensor.*list", TypeError, {"student": [[1.0]]}),
        (r"teacher must be a tensor.*NoneType", TypeError, {"teacher": None}),
        (
            r"teacher must be on cpu like student, but is on meta",
            ValueError,
            {"teacher": torch.zeros(4, 5, device="meta")},
        ),
        (r"temperature must be above 0.*is 0", ValueError, {"temperature": 0}),
        (r"temperature must be above 0.*is -1", ValueError, {"temperature": -1.0}),
        (r"temperature must be above 0.*nan", ValueError, {"temperature": math.nan}),
        (r"temperature must be a number.*NoneType", TypeError, {"temperature": None}),
        (r"temperature must be a number.*list", TypeError, {"temperature": [1.0]}),
        (r"temperature must be a number.*Tensor", TypeError, {"temperature": torch.tensor(1.0)}),
        (r'reduction must be "none", "sum" or "batchmean", but is \'mean\'', ValueError, {"reduction": "mean"}),
        (r"weight must have shape \[4\].*\[3\]", ValueError, {"weight": torch.ones(3)}),
        (r"weight must have dtype.*int64", TypeError, {"weight": torch.ones(4, dtype=torch.int64)}),
        (r"weight must be a tensor.*float", TypeError, {"weight": 1.0}),
        (r"weight must be on cpu.*meta", ValueError, {"weight": torch.ones(4, device="meta")}),
    ]:
        with pytest.raises(error, match=match):
            ops.kl_div(**{"student": good, "teacher": good, "weight": weight, **arguments})
    with pytest.raises(ValueError, match=r"weight must have shape \[4\] or \[4, 3\], one value per row, but has \[3\]"):
        ops.kl_div(torch.zeros(4, 5, 3), torch.zeros(4, 5, 3), weight=torch.ones(3))
    with pytest.raises(ValueError, match=r'direction must be "teacher" or "student", but is \'both\''):
        ops.dual_kl(good, good, good, direction="both")
    with pytest.raises(ValueError, match=r"b must have the shape \[4, 5\] of a, but has \[4, 4\]"):
        ops.dual_kl(good, torch.zeros(4, 4), good)
    with pytest.raises(TypeError, match=r"logits must be a tensor"):
        ops.entropy(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reduction must be"):
        ops.entropy(good, reduction=None)  # type: ignore[arg-type]


def test_bool_weights_and_whole_temperatures() -> None:
    student, teacher = logits(2, 4, 5)
    mask = torch.tensor([True, False, True, True])
    expected = ops.kl_div(student, teacher, 2.0, weight=mask.float())
    assert torch.equal(ops.kl_div(student, teacher, 2, weight=mask), expected)
