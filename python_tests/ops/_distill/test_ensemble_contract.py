"""Tests of js_div and consensus on every backend, and of ensemble_kl beyond numbers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._core.backend import select
from fedkern.ops._distill.ensemble_reference import js_reference
from fedkern.ops._distill.kernels import CONSENSUS
from python_tests.ops._distill.ensemble_cases import MIXES, logits
from python_tests.ops.operator_cases import KERNELS, using

HOWS = [how for how, _ in MIXES.values()]

# --- weights and masks


def test_weights_of_every_shape_beside_positions(backend: str) -> None:
    maps, teachers = logits(2, 5, 3, 2), logits(3, 2, 5, 3, 2, seed=1)
    for shape in ((3, 2), (3, 5), (3, 2, 1), (3, 2, 5), (3, 2, 1, 3, 2), (3, 1, 5, 1, 2), (3, 2, 5, 3, 2)):
        weights = torch.rand(shape) + 0.1
        got = ops.ensemble_kl(maps, teachers, weights, 2.0, reduction="none")
        full = shape if len(shape) != 2 else (3, 2, 1) if shape == (3, 2) else (3, 1, 5)
        spread = weights.reshape(*full, *[1] * (5 - len(full))).expand(3, 2, 5, 3, 2)
        for i in range(3):
            expected = ops.ensemble_kl(maps[..., i, 1], teachers[..., i, 1], spread[..., i, 1], 2.0, reduction="none")
            torch.testing.assert_close(got[:, i, 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-60, 1e-300, 5e-324, 1e38, 1.5e308])
def test_float64_weights_of_any_scale(backend: str, scale: float, dtype: torch.dtype) -> None:
    """Shares and gradients of the weights are those of small numbers."""
    student, teachers = logits(4, 5).to(dtype), logits(3, 4, 5, seed=1).to(dtype)
    plain = torch.tensor([1.0, 0.0, 1.0] if scale > 1e308 or scale < 1e-320 else [1.0, 0.25, 0.5], dtype=torch.float64)

    def check(loss: Callable[[Tensor], Tensor]) -> None:
        for shape in ((3,), (3, 4)):
            unit_weights = plain.reshape(3, *[1] * (len(shape) - 1)).expand(shape)
            torch.testing.assert_close(loss(unit_weights * scale), loss(unit_weights), rtol=1e-6, atol=1e-7)
            if 1e-200 < scale < 1e200:
                leaf, unit = (unit_weights * scale).requires_grad_(), unit_weights.clone().requires_grad_()
                given, wanted = torch.autograd.grad(loss(leaf), leaf)[0], torch.autograd.grad(loss(unit), unit)[0]
                torch.testing.assert_close(given * scale, wanted, rtol=1e-4, atol=1e-6)

    for how in HOWS:
        check(lambda weights, how=how: ops.ensemble_kl(student, teachers, weights, 2.0, **how))
    check(lambda weights: ops.js_div(teachers, weights))
    check(lambda weights: sum(ops.consensus(teachers, weights)))


def test_weights_that_could_mean_two_things() -> None:
    student, teachers = logits(4, 4), logits(3, 4, 4)
    with pytest.raises(ValueError, match=r"could be \[K, B\] or \[K, C\].*give \[K, B, 1\] or \[K, 1, C\]"):
        ops.ensemble_kl(student, teachers, torch.rand(3, 4))
    ops.ensemble_kl(student, teachers, torch.rand(3, 4, 1))
    ops.ensemble_kl(student, teachers, torch.rand(3, 1, 4))


def test_who_has_weight_zero_is_not_looked_at(backend: str) -> None:
    interpreted = backend == "triton"
    for shape in ((6, 5, 3),) if interpreted else ((6, 40), (40, 5), (6, 5, 3)):
        student, teachers = logits(*shape), logits(4, *shape, seed=1)
        weights = torch.rand(4, shape[0], 1) + 0.1
        weights[2] = 0
        by_class = weights * (torch.rand(shape[1]) + 0.5)
        calls = [
            (given, lambda s, t, w, T=temperature, how=how: ops.ensemble_kl(s, t, w, T, **how))
            for how in HOWS
            for given in ((weights, by_class) if "mix" in how else (weights,))
            for temperature in ((2.0,) if interpreted else (2.0, math.inf))
        ]
        calls += [
            (weights[..., 0], lambda s, t, w: ops.entropy(s) + ops.js_div(t, w)),
            (weights[..., 0], lambda s, t, w: ops.entropy(s) + sum(ops.consensus(t, w))),
        ]
        for given, call in calls:
            clean = call(student, teachers, given)
            for bad in (math.nan,) if interpreted else (math.nan, math.inf, -math.inf):
                spoiled = teachers.clone()
                spoiled[2] = bad
                leaves = [x.clone().requires_grad_() for x in (student, spoiled, given)]
                loss = call(*leaves)
                loss.backward()
                torch.testing.assert_close(loss.detach(), clean)
                assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
                assert not leaves[1].grad[2].any()  # type: ignore[index]
                assert not leaves[2].grad[2].any()  # type: ignore[index]


# --- what is equal to what


def test_log_probabilities_are_taken_as_they_are(backend: str) -> None:
    """The second teacher lacks half of its mass and counts half."""
    student, teachers = logits(6, 9), logits(3, 6, 9, seed=1)
    halved = teachers.log_softmax(2)
    halved[1] += math.log(0.5)
    got = ops.ensemble_kl(student, halved, log_probs=True)
    torch.testing.assert_close(got, ops.ensemble_kl(student, teachers, torch.tensor([1.0, 0.5, 1.0])))


def test_classes_masked_by_the_student_alone(backend: str) -> None:
    for rows in (1, 20):
        student, teachers = logits(rows, 5), logits(3, rows, 5, seed=1)
        student[0, 2] = -math.inf
        for how in HOWS:
            loss = ops.ensemble_kl(student, teachers, reduction="none", **how)
            assert loss[0] == math.inf
            assert loss[1:].isfinite().all()
        teachers[:, 0, 2] = -math.inf
        assert ops.ensemble_kl(student, teachers).isfinite()


# --- torch.func, torch.compile


def test_class_masks_that_are_mapped_or_shared() -> None:
    students, stacks = torch.stack([logits(6, 5, seed=n) for n in range(3)]), torch.stack([logits(3, 6, 5)] * 3)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0], [1, 0, 1, 1, 1]]).bool()
    masks = torch.stack([mask, ~mask, mask.roll(1, 0)])

    def loss(student: Tensor, teachers: Tensor, mask: Tensor) -> Tensor:
        return ops.ensemble_kl(student, teachers, None, 2.0, class_mask=mask)

    gradient = torch.func.grad(loss, argnums=(0, 1))
    for given, axis in ((mask, None), (masks, 0)):
        mapped = torch.vmap(gradient, in_dims=(0, 0, axis))(students, stacks, given)
        for i in range(3):
            expected = gradient(students[i], stacks[i], mask if axis is None else masks[i])
            torch.testing.assert_close([x[i] for x in mapped], list(expected))


def test_compile_with_a_class_mask() -> None:
    student, teachers, mask = logits(4, 5), logits(3, 4, 5, seed=1), torch.rand(3, 5) > 0.3
    compiled = torch.compile(
        lambda s, t, m: ops.ensemble_kl(s, t, temperature=2.0, class_mask=m), fullgraph=True, backend="aot_eager"
    )
    expected = ops.ensemble_kl(student, teachers, temperature=2.0, class_mask=mask)
    torch.testing.assert_close(compiled(student, teachers, mask), expected)


# --- errors


def test_wrong_arguments() -> None:
    good, teachers = torch.zeros(4, 5), torch.zeros(3, 4, 5)
    wrong = {
        ValueError: [
            (
                r"student must have the shape \[4, 5\] of one of the teachers, but has \[4, 6\]",
                {"student": torch.zeros(4, 6)},
            ),
            (r"student must be on cpu like teachers, but is on meta", {"student": torch.zeros(4, 5, device="meta")}),
            (r"teachers must have shape \[K, B, C\].*has \[4, 5\]", {"teachers": torch.zeros(4, 5)}),
            (r"at least one teacher and class.*\[0, 4, 5\]", {"teachers": torch.zeros(0, 4, 5)}),
            (r"weights must have shape \[K\], \[K, B\].*\[2\]", {"weights": torch.ones(2)}),
            (
                r"class_mask must have shape \[K, C\], here \[3, 5\], but has \[5, 3\]",
                {"class_mask": torch.ones(5, 3) > 0},
            ),
            (r"temperature must be above 0.*is 0", {"temperature": 0}),
            (r'mix must be "probs"', {"mode": "mean_of_kl", "mix": "logits"}),
            (r"weights per teacher", {"mode": "mean_of_kl", "weights": torch.ones(3, 5)}),
            (r"no class_mask", {"mode": "mean_of_kl", "class_mask": torch.ones(3, 5) > 0}),
        ],
        TypeError: [(r"class_mask must have dtype bool, but has torch.float32", {"class_mask": torch.ones(3, 5)})],
    }
    for error, cases in wrong.items():
        for match, arguments in cases:
            with pytest.raises(error, match=match):
                ops.ensemble_kl(**{"student": good, "teachers": teachers, **arguments})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_that_are_negative_or_no_numbers_are_refused(backend: str, dtype: torch.dtype) -> None:
    student, teachers = logits(4, 5), logits(3, 4, 5, seed=1)
    weights = torch.tensor([3.0, -1.0, 2.0], dtype=dtype)
    rows = torch.rand(3, 4, dtype=dtype)
    rows[2, 3] = -1e-3
    by_class = torch.rand(3, 4, 5, dtype=dtype)
    by_class[0, 1, 4] = -1
    calls = [lambda w, how=how: ops.ensemble_kl(student, teachers, w, **how) for how in HOWS]
    calls += [lambda w: ops.js_div(teachers, w), lambda w: ops.consensus(teachers, w)[0]]
    for call in calls:
        worse = [weights.masked_fill(weights < 0, value) for value in (math.nan, math.inf, -math.inf)]
        for wrong in (weights, rows, weights.clone().requires_grad_(), *worse):
            with pytest.raises(ValueError, match="weights must be at least 0 and finite"):
                call(wrong)
        with pytest.raises(ValueError, match="weights must be at least 0"):
            torch.func.vmap(call)(torch.stack([weights.abs(), weights]))
        call(weights.abs()), call(torch.zeros(3, dtype=dtype)), call(weights > 0)
    for mix in ("probs", "logits"):
        with pytest.raises(ValueError, match="weights must be at least 0"):
            ops.ensemble_kl(student, teachers, by_class, mix=mix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_losses_of_16_bits_in_float32(backend: str, dtype: torch.dtype) -> None:
    student, teachers = (x.to(dtype).requires_grad_() for x in (logits(4, 5), logits(3, 4, 5, seed=1)))
    calls = [lambda s, t, how=how: ops.ensemble_kl(s, t, **how) for how in HOWS]
    calls += [
        lambda s, t: ops.kl_div(s, t[0]),
        lambda s, t: ops.dual_kl(s, s, t[0], 2.0, direction="student", reduction="none"),
        lambda s, t: ops.kl_div(s, t[0], 100.0),
        lambda s, t: ops.js_div(t) + ops.entropy(s),
        lambda s, t: ops.consensus(t)[1] + ops.entropy(s),
        lambda s, t: ops.contrastive(s, t[0]),
    ]
    for number, call in enumerate(calls):
        assert call(student, teachers).dtype is dtype
        with torch.autocast("cpu", dtype=dtype):
            loss = call(student, teachers)
            assert call(student.double(), teachers.double()).dtype is torch.float64
            with ops.use_backend(None):  # the reference serves mapped contrastive losses
                mapped = torch.func.vmap(call)(student[None], teachers[None])
        assert loss.dtype is mapped.dtype is torch.float32
        wide = [x.detach().float().requires_grad_() for x in (student, teachers)]
        expected = call(*wide)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(mapped[0], expected)
        got = torch.autograd.grad(loss.sum(), (student, teachers), allow_unused=True)
        for ours, theirs in zip(got, torch.autograd.grad(expected.sum(), wide, allow_unused=True), strict=True):
            assert (ours is None) == (theirs is None), number
            if ours is not None and theirs is not None:
                torch.testing.assert_close(ours, theirs.to(dtype))


# --- what the divergence is


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
@pytest.mark.parametrize("classes", [3, 10, 100, 1000])
def test_nearly_equal_distributions_keep_their_digits(backend: str, classes: int, scale: float) -> None:
    stack = logits(33, classes) + scale * logits(4, 33, classes, seed=1)
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5])
    loss = ops.js_div(stack, weights, reduction="none")
    expected = js_reference(stack.double(), weights.double()[:, None].expand(4, 33), 0)
    limit = 1e-1 if backend == "reference" else 3e-5
    assert ((loss - expected).abs() / expected).max() < limit
    assert (loss >= 0).all()


def test_equal_distributions_do_not_diverge(backend: str) -> None:
    for shape in ((7, 101),) if backend == "triton" else ((33, 101), (40, 10)):
        stack = logits(*shape).expand(5, *shape).clone().requires_grad_()
        for weights in (None, torch.rand(5) + 0.1):
            loss = ops.js_div(stack, weights, reduction="none")
            assert loss.abs().max() <= (1e-10 if backend == "reference" else 0)
            (gradient,) = torch.autograd.grad(loss.sum(), stack)
            assert gradient.abs().max() < 1e-6


def test_never_above_log_k(backend: str) -> None:
    for count in (2, 3, 5, 20):
        for classes in (count, 129):
            stack = torch.zeros(count, 7, classes)
            stack[torch.arange(count), :, torch.arange(count)] = 200.0
            loss = ops.js_div(stack, reduction="none")
            assert (loss <= math.log(count)).all()
            torch.testing.assert_close(loss, torch.full((7,), math.log(count)))


# --- gradients


KEPT = [  # shape, and whether samples come before teachers in memory
    ((20, 33, 100), False),
    ((20, 33, 100), True),
    ((20, 33, 10), False),  # a row per lane
    ((12, 40, 30), False),
    ((9, 5, 40, 3, 7), False),
    ((40, 3, 700), False),  # longer than the workspace
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_gradients_from_what_consensus_kept(name: str, dtype: torch.dtype) -> None:
    """Classes are masked, and teachers of weight 0 hold NaN.

    The bits are the same on one thread and on two.
    """
    relative, absolute = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 2e-6)}.get(dtype, (1e-2, 1e-3))
    for number, (shape, samples_first) in enumerate(KEPT):
        for reduction in ("none", "batchmean"):
            x = 1.5 * logits(*shape, seed=number, dtype=dtype)
            weights = torch.rand(shape[0], generator=torch.Generator().manual_seed(number)) + 0.1
            x[1, 0, 2] = -math.inf
            absent = (number + (reduction == "none")) % 2 == 0
            if absent:
                weights[2], x[2] = 0, math.nan
            if samples_first:
                x = x.transpose(0, 1).contiguous().transpose(0, 1)

            def gradient(x: Tensor, w: Tensor = weights, how: str = reduction) -> Tensor:
                mixture, mean = ops.consensus(x, w, reduction=how)
                loss = (0.7 * mixture - 0.3 * mean).sum()
                (once,) = torch.autograd.grad(loss, x, retain_graph=True)
                assert torch.equal(once, torch.autograd.grad(loss, x)[0])
                return once

            x.requires_grad_()
            with using(name):
                kernel = select("consensus", x)
                assert kernel.stack_statistics(x, CONSENSUS) is not None
                torch.set_num_threads(1)
                got = gradient(x)
                torch.set_num_threads(2)
                assert torch.equal(gradient(x), got)
            with using("reference"):
                expected = gradient(x.detach().double().requires_grad_(), weights.double())
            if absent:
                assert not got[2].any()
                got, expected = (torch.cat([g[:2], g[3:]]) for g in (got, expected))
            torch.testing.assert_close(got.double(), expected, rtol=relative, atol=absolute)


# --- errors


def test_wrong_arguments_of_consensus() -> None:
    good = torch.zeros(3, 4, 5)
    for match, error, arguments in [
        (r"logits must have shape \[K, B, C\].*\[4, 5\]", ValueError, (torch.zeros(4, 5),)),
        (r"at least one teacher and class.*\[0, 4, 5\]", ValueError, (torch.zeros(0, 4, 5),)),
        (r"weights must have shape \[3\], \[3, 4\], but has \[4\]", ValueError, (good, torch.ones(4))),
        (r"weights must be on cpu.*meta", ValueError, (good, torch.ones(3, device="meta"))),
    ]:
        for function in (ops.js_div, ops.consensus):
            with pytest.raises(error, match=match):
                function(*arguments)
