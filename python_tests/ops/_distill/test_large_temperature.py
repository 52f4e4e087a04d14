"""Tests from temperature 1 to infinity: losses and gradients approach the limit without jumps or lost digits."""

import math
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from fedkern import ops
from python_tests.ops.operator_cases import assert_close

SHARES = (0.125, 0.375, 0.5)
ENSEMBLES = {"probs": {}, "logits": {"mix": "logits"}, "mean": {"mode": "mean_of_kl"}}
CALLS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl_div": lambda s, t, T: ops.kl_div(s, t[0], T),
    "student": lambda s, t, T: ops.dual_kl(s, s, t[0], T, direction="student") / 2,
    **{
        name: lambda s, t, T, how=how: ops.ensemble_kl(s, t, s.new_tensor(SHARES), T, **how)
        for name, how in ENSEMBLES.items()
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
@pytest.mark.parametrize("call", CALLS)
def test_every_temperature_keeps_its_digits(backend: str, call: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(1, 4, generator=generator, dtype=dtype) * 3
    teachers = torch.randn(3, 1, 4, generator=generator, dtype=dtype) * 3
    for temperature in (1.0, 30.0, 63.0, 65.0, 1e3, 1e6, 1e9, 1e14, 1e30, 1e38, 1e50, math.inf):
        loss = CALLS[call](student, teachers, temperature)
        assert loss.item() == pytest.approx(
            _exact(call, student, teachers, temperature), rel=1e-5 if dtype is torch.float32 else 1e-13
        )


@pytest.mark.parametrize("call", CALLS)
def test_gradients_keep_their_digits(backend: str, call: str) -> None:
    """The gradients are those of the limit, less than 1e-7 away at such temperatures."""
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(shape, generator=generator) for shape in ((5, 20), (3, 5, 20))]

    def gradients(tensors: Sequence[Tensor], temperature: float) -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in tensors]
        return torch.autograd.grad(CALLS[call](*inputs, temperature), inputs)

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
