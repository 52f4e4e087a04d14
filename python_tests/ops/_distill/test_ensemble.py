"""Tests of ensemble_kl where random calls (test_differential.py) do not look closely enough."""

import math
from typing import Any

import pytest
import torch

from fedkern import ops
from fedkern.ops._distill.ensemble_reference import ensemble_reference
from python_tests.ops._distill import ensemble_cases
from python_tests.ops.operator_cases import BACKENDS, KERNELS, assert_close, using


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("operator", "how"),
    [
        ("probs", {"temperature": 2.0}),
        ("probs", {"weights": (1, 33_001)}),
        ("probs", {"weights": (1, 33_001), "log_probs": True}),
        ("logits", {"weights": (1, 33_001), "temperature": 2.0}),
        ("mean", {"log_probs": True}),
        ("probs", {"weights": (1, 33_001), "temperature": math.inf}),
        ("mean", {"temperature": math.inf}),
        ("js_div", {}),
        ("consensus", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("values", ["normal", "equal"])
def test_rows_longer_than_the_workspace(name: str, operator: str, how: dict[str, Any], values: str) -> None:
    """The rows are so long that every pass reads all teachers' rows again."""
    with using(name):
        how = {"weights": (1, 1), **how} if operator in ensemble_cases.MIXES else how
        ensemble_cases.check_rows(operator, 3, (1, 33_001), values=values, **how)


@pytest.mark.parametrize("temperature", [1.0, 20.0, 40.0])
@pytest.mark.parametrize("layout", ["rows", "positions"])
def test_largest_logits_of_long_rows_stand_last(backend: str, layout: str, temperature: float) -> None:
    # A later tile's maximum is hundreds above: what is nothing at temperature 1 counts at 40.
    rise = torch.linspace(-2000, 2000, 6000)
    teachers = rise + 100 * ensemble_cases.logits(2, 5, 6000)
    student = ensemble_cases.logits(5, 6000, seed=1)
    if layout == "positions":
        teachers, student = teachers.transpose(1, 2).unsqueeze(1), student.t().unsqueeze(0)
        teachers, student = teachers.contiguous(), student.contiguous()
    for mode in ("kl_of_mean", "mean_of_kl"):
        got = ops.ensemble_kl(student, teachers, None, temperature, mode=mode, reduction="none")
        with ops.use_backend("reference"):
            exact = ops.ensemble_kl(student.double(), teachers.double(), None, temperature, mode=mode, reduction="none")
        assert_close(mode, got, exact, relative=1e-4, absolute=1e-4)


def test_weights_of_other_dtypes_than_the_logits(backend: str) -> None:
    ensemble_cases.compare_dtypes_of_weights(backend)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("difference", ensemble_cases.DIFFERENCES)
@pytest.mark.parametrize("classes", [2, 40])
def test_masks_that_leave_little_mass(backend: str, classes: int, difference: float) -> None:
    ensemble_cases.compare_little_mass(backend, difference, classes, rows=5 if backend == "triton" else 21)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "settings",
    [{"dtype": torch.float64}, {"log_probs": True}, {"temperature": 2.0}, {"classes": 33_001, "rows": 2}],
    ids=str,
)
def test_little_mass_in_other_ways(backend: str, settings: dict[str, Any]) -> None:
    if backend == "triton" and "classes" in settings:
        pytest.skip("too long for the interpreter")
    for difference in (30.0, 200.0, 1e4):
        ensemble_cases.compare_little_mass(backend, difference, **{"classes": 6, "rows": 5, **settings})


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scale", [10.0, 20.0])
def test_masks_on_teachers_who_are_sure(backend: str, scale: float) -> None:
    ensemble_cases.compare_random_masks(backend, scale, rows=50 if backend == "triton" else 5000)


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
@pytest.mark.parametrize("classes", [3, 10, 100, 1000])
def test_nearly_equal_rows_keep_their_digits(backend: str, classes: int, scale: float) -> None:
    student = ensemble_cases.logits(33, classes)
    teachers = student + scale * ensemble_cases.logits(4, 33, classes, seed=1)
    for how, code in ensemble_cases.MIXES.values():
        loss = ops.ensemble_kl(student, teachers, reduction="none", **how)
        expected = ensemble_reference(student.double(), teachers.double(), None, None, 1.0, code, False, 0)
        # The reference in float32 keeps the sign and the order of magnitude; the kernels keep the digits.
        limit = 1e-1 if backend == "reference" else 3e-5
        assert ((loss - expected).abs() / expected).max() < limit, how
        assert (loss >= 0).all()


def test_equal_rows_have_no_divergence(backend: str) -> None:
    for shape in ((7, 101),) if backend == "triton" else ((33, 101), (40, 10)):
        student = ensemble_cases.logits(*shape).requires_grad_()
        teachers = student.detach().expand(5, *shape)
        for temperature in (0.5, 1.0, math.inf):
            loss = ops.ensemble_kl(student, teachers, None, temperature, reduction="none")
            # Triton leaves the limit to the reference.
            rounded = backend == "reference" or (backend == "triton" and math.isinf(temperature))
            assert loss.abs().max() <= (1e-10 if rounded else 0)
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert gradient.abs().max() < 1e-6


def test_weights_of_large_logits_of_one_class_have_no_gradient(backend: str) -> None:
    # A divergence of one class is 0 whatever is mixed; a rounded mixture must not tell by the distance of the teachers.
    student, teachers = ensemble_cases.logits(20, 1), 3e3 * ensemble_cases.logits(2, 20, 1, seed=1)
    for weights in (torch.tensor([1.6, 0.3]), torch.rand(2, 20, generator=torch.Generator().manual_seed(2))):
        loss = ops.ensemble_kl(student, teachers, weights.requires_grad_(), mix="logits")
        (gradient,) = torch.autograd.grad(loss, weights)
        assert gradient.abs().max() <= 1e-9


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("by", ["mask", "weights", "both"])
@pytest.mark.parametrize("mix", ["probs", "logits"])
def test_what_a_teacher_holds_in_classes_that_it_does_not_know(name: str, by: str, mix: str) -> None:
    """NaN, infinities and a dtype's limits count as -inf in losses and gradients, at every temperature."""
    student, teachers = ensemble_cases.logits(6, 5), ensemble_cases.logits(3, 6, 5, seed=1)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    rows = mask[:, None, :].float().expand(3, 6, 5)
    how = {"mask": {"class_mask": mask}, "weights": {"weights": rows}, "both": {"class_mask": mask, "weights": rows}}[
        by
    ]

    def results(held: float, temperature: float) -> list[torch.Tensor]:
        leaves = [student.clone(), teachers.masked_fill(~mask[:, None, :], held)]
        for leaf in leaves:
            leaf.requires_grad_()
        loss = ops.ensemble_kl(*leaves, temperature=temperature, mix=mix, reduction="none", **how)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    limits = torch.finfo(torch.float32)
    for temperature in (1.0, 3.0, math.inf) if name != "triton" else (2.0, math.inf):
        with using(name):
            wanted = results(-math.inf, temperature)
            assert all(part.isfinite().all() for part in wanted)
            for held in (math.nan, math.inf, limits.min, limits.max):
                assert all(map(torch.equal, results(held, temperature), wanted))
    if name == "reference":
        assert all(map(torch.equal, results(math.nan, 100.0), results(-math.inf, 100.0)))
        unknown = teachers.masked_fill(~mask[:, None, :], math.nan)
        gradient = torch.func.grad(lambda x: ops.ensemble_kl(x, unknown, mix=mix, **how))(student)
        assert gradient.isfinite().all()
