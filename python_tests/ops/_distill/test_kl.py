"""Tests of kl_div, dual_kl and entropy where random calls (test_differential.py) do not look closely enough."""

import math

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._core.backend import select
from fedkern.ops._distill.kernels import Divergence
from fedkern.ops._distill.reference import kl_div_reference
from python_tests.ops import operator_cases


def compare_nearly_equal(device: torch.device | str, classes: int, scale: float, rows: int, limit: float) -> None:
    torch.manual_seed(classes)
    student = torch.randn(rows, classes)
    teacher = student + scale * torch.randn(rows, classes)
    for temperature in (0.5, 1.0, 4.0, math.inf):
        loss = ops.kl_div(student.to(device), teacher.to(device), temperature, reduction="none").cpu()
        expected = kl_div_reference(student.double(), teacher.double(), temperature, reduction="none")
        assert ((loss - expected).abs() / expected).max() < limit
        assert (loss >= 0).all()


@pytest.mark.sampled(8)
@pytest.mark.parametrize("scale", [1e-2, 1e-3])
@pytest.mark.parametrize("classes", [3, 10, 100, 1000, 5000])
def test_nearly_equal_rows_keep_their_digits(backend: str, classes: int, scale: float) -> None:
    # The reference in float32 keeps the sign and the order of magnitude; the kernels keep the digits.
    compare_nearly_equal("cpu", classes, scale, 65, 3e-2 if backend == "reference" else 2e-5)


def compare_rows_far_apart(backend: str, device: str | torch.device, classes: int, shifted: str, offset: float) -> None:
    """Compare rows with large offsets: a softmax ignores what is added to a whole row, and so does the error."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(40, classes, generator=generator) for _ in range(2))
    teacher, student = (x + offset * (name == shifted) for x, name in ((teacher, "teacher"), (student, "student")))
    exact_student = student.double().requires_grad_()
    exact = kl_div_reference(exact_student, teacher.double(), temperature=2.0, reduction="none")
    (wanted,) = torch.autograd.grad(exact.sum(), exact_student)
    student, teacher = student.to(device).requires_grad_(), teacher.to(device)
    losses = {
        "kl_div": ops.kl_div(student, teacher, 2.0, reduction="none"),
        "dual_kl": ops.dual_kl(student, student, teacher, 2.0, reduction="none") / 2,
        "probs": ops.ensemble_kl(student, teacher[None], None, 2.0, reduction="none"),
        "logits": ops.ensemble_kl(student, teacher[None], None, 2.0, mix="logits", reduction="none"),
        "mean": ops.ensemble_kl(student, teacher[None], None, 2.0, mode="mean_of_kl", reduction="none"),
    }
    for name, loss in losses.items():
        # Triton takes mixed logits relative to the student's, and so in the digits of the student's distance.
        coarse = backend == "triton" and name == "logits" and shifted == "student"
        absolute = 1e-6 * abs(offset) if coarse else 4e-6
        operator_cases.assert_close(name, loss.cpu(), exact, absolute=absolute)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        operator_cases.assert_close(f"gradient of {name}", gradient.cpu(), wanted, absolute=absolute)


@pytest.mark.parametrize("offset", [20.0, 5e3, -5e3])
@pytest.mark.parametrize("shifted", ["teacher", "student"])
@pytest.mark.parametrize("classes", [3, 100])
def test_rows_that_lie_far_apart_keep_their_digits(backend: str, classes: int, shifted: str, offset: float) -> None:
    compare_rows_far_apart(backend, "cpu", classes, shifted, offset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_shared_16_bit_weight_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher, along = (torch.randn(shape, generator=generator) for shape in ((4, 3, 50), (4, 3, 50), (4, 50)))
    weight = torch.rand(4, generator=generator).to(dtype).requires_grad_()
    loss = ops.kl_div(student, teacher, weight=weight, reduction="none")
    (gradient,) = torch.autograd.grad(loss, weight, along)
    exact = kl_div_reference(student.double(), teacher.double(), reduction="none")
    assert gradient.dtype is dtype
    operator_cases.assert_close("gradient of weight", gradient, (exact * along.double()).sum(1), absolute=1e-5)


def test_equal_rows_have_no_divergence(backend: str) -> None:
    logits = torch.randn(33, 101) * 5
    for temperature in (0.5, 1.0, math.inf):
        student = logits.clone().requires_grad_()
        loss = ops.kl_div(student, logits, temperature, reduction="none")
        assert torch.equal(loss, torch.zeros(33))
        loss.sum().backward()
        assert student.grad.abs().max() < 1e-7


@pytest.mark.sampled(8)
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("classes", [2, 10, 129, 1000])
def test_no_larger_error_than_eager_torch(backend: str, classes: int, scale: float) -> None:
    functional = torch.nn.functional
    torch.manual_seed(classes)
    student, teacher = torch.randn(2, 199, classes) * scale

    def eager(s: Tensor, t: Tensor) -> Tensor:
        return functional.kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="none").sum(1)

    exact = eager(student.double(), teacher.double())
    theirs = (eager(student, teacher) - exact).abs().max()
    ours = (ops.kl_div(student, teacher, reduction="none") - exact).abs().max()
    assert ours <= theirs + 2e-7 * exact.max()

    def entropy(x: Tensor) -> Tensor:
        return -(x.log_softmax(1).exp() * x.log_softmax(1)).sum(1)

    exact = entropy(student.double())
    theirs = (entropy(student) - exact).abs().max()
    assert (ops.entropy(student, reduction="none") - exact).abs().max() <= theirs + 2e-7 * exact.max()


@pytest.mark.parametrize("dtype", operator_cases.DTYPES)
@pytest.mark.parametrize("name", operator_cases.KERNELS)
def test_every_offset_over_sentinels(name: str, dtype: torch.dtype) -> None:
    """Loads are misaligned and writes would be out of range, at every offset of a row's start."""
    rows, classes = 5, 101
    size = rows * classes
    torch.manual_seed(0)
    source = torch.randn(3, size + len(operator_cases.OFFSETS)).to(dtype)
    sentinel = 777.0
    with operator_cases.using(name):
        for offset in operator_cases.OFFSETS:
            s, t, o = (x[offset : offset + size].view(rows, classes) for x in source)
            out = torch.full((3, size + len(operator_cases.OFFSETS) + 64), sentinel, dtype=dtype)
            to_s, to_o, to_t = (x[offset + 11 : offset + 11 + size].view(rows, classes) for x in out)
            kernel = select("dual_kl", s, t)
            loss = kernel.divergence_forward(Divergence(s, o, t, None, 1.0, False, 2), (to_s, to_o, to_t))
            inputs = [x.double().requires_grad_() for x in (s, t, o)]
            expected = kl_div_reference(inputs[0], inputs[1], peer=inputs[2])
            expected.backward()
            operator_cases.assert_close(f"offset {offset}", loss, expected)
            for x, got in zip(inputs, (to_s, to_t, to_o), strict=True):
                operator_cases.assert_close(f"offset {offset}", got, x.grad)
            assert (out[:, : offset + 11] == sentinel).all()
            assert (out[:, offset + 11 + size :] == sentinel).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", operator_cases.KERNELS)
def test_exp_within_two_ulp(name: str) -> None:
    """The samples are every 499th float, then a dense set of doubles."""
    from fedkern.ops._core.backend import cpu_core

    with operator_cases.using(name):
        bits = torch.arange(0, 2**32, 499, dtype=torch.int64)
        x = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
        out = torch.empty_like(x)
        cpu_core().exp(0, x.numel(), x.data_ptr(), out.data_ptr())
        exact = x.double().exp()
        normal = exact.isfinite() & (exact < torch.finfo(torch.float32).max)
        error = (out.double() - exact).abs()[normal] / operator_cases.ulp(exact[normal], torch.float32)
        assert error.max() <= 2
        assert (out[x == math.inf] == math.inf).all()
        assert (out[x == -math.inf] == 0).all()
        assert out[x > 89].isinf().all()
        assert torch.equal(out.isnan(), x.isnan())
        y = torch.linspace(-700, 709, 200_001, dtype=torch.float64)
        out = torch.empty_like(y)
        cpu_core().exp(1, y.numel(), y.data_ptr(), out.data_ptr())
        assert ((out - y.exp()).abs() / operator_cases.ulp(y.exp(), torch.float64)).max() <= 3


@pytest.mark.parametrize("temperature", [1e-3, 0.3, 1.0, 2.0, 3.7, 1e4])
@pytest.mark.parametrize("name", operator_cases.KERNELS)
def test_exp_over_a_temperature_within_its_bound(name: str, temperature: float) -> None:
    """The bound is two ulp and the rounding of 1 / temperature.

    The samples are every 9973rd float from -0 to -inf and NaN, then doubles.
    """
    from fedkern.ops._core.backend import cpu_core

    with operator_cases.using(name):
        bits = torch.cat([torch.arange(2**31, 2**32, 9973, dtype=torch.int64), torch.tensor([0xFF800000])])
        x = (bits - 2**32).to(torch.int32).view(torch.float32)
        for part in (x, torch.linspace(-110, 0, 100_001) * temperature):
            out = torch.empty_like(part)
            cpu_core().scaled_exp(0, part.numel(), part.data_ptr(), out.data_ptr(), temperature)
            exponent = part.double() / temperature
            exact = exponent.exp()
            bound = 2 * operator_cases.ulp(exact, torch.float32) + 2.0**-24 * exponent.abs() * exact
            usual = exponent.isfinite()
            assert ((out.double() - exact).abs() <= bound)[usual].all()
            assert (out[part == -math.inf] == 0).all()
            assert torch.equal(out.isnan(), part.isnan())
        y = torch.linspace(-745, 0, 100_001, dtype=torch.float64)
        scaled, out = y * temperature, torch.empty_like(y)
        cpu_core().scaled_exp(1, y.numel(), scaled.data_ptr(), out.data_ptr(), temperature)
        exact = (scaled / temperature).exp()
        bound = 3 * operator_cases.ulp(exact, torch.float64) + 2.0**-52 * y.abs() * exact
        assert ((out - exact).abs() <= bound).all()
