"""What must hold whatever the numbers are: losses over logits, blending, fusing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedkern import ops
from python_tests.ops.property_inputs import QUARTERS, examples, logits, members, orders, tensors

pytestmark = pytest.mark.usefixtures("one_thread")


def close(got: Tensor, expected: Tensor, scale: Tensor | float = 1.0) -> None:
    """At the operators' tolerance; ``scale`` is the largest difference of logits."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * max(1.0, float(scale)))


def spread(*given: Tensor) -> float:
    return float(torch.cat([x.flatten() for x in given]).abs().max()) * 2


# --- divergences of pairs


@examples
@given(logits(2), st.sampled_from([0.5, 1.0, 3.0, math.inf]))
def test_kl_is_not_negative_and_zero_for_equal_inputs(pair: list[Tensor], temperature: float) -> None:
    student, teacher = pair
    assert (ops.kl_div(student, teacher, temperature, reduction="none") >= 0).all()
    assert (ops.kl_div(student, student.clone(), temperature, reduction="none") == 0).all()


@examples
@given(logits(2, QUARTERS), st.lists(st.integers(-1000, 1000), min_size=8, max_size=8))
def test_kl_is_shift_invariant(pair: list[Tensor], shifts: list[int]) -> None:
    """Quarters plus whole numbers are exact in fp32, so the shifted rows are the same distributions."""
    student, teacher = pair
    rows = student.shape[0]
    by_student, by_teacher = (torch.tensor(part[:rows], dtype=torch.float32)[:, None] for part in (shifts, shifts[4:]))
    for temperature in (1.0, 2.0, math.inf):
        expected = ops.kl_div(student, teacher, temperature, reduction="none")
        got = ops.kl_div(student + by_student, teacher + by_teacher, temperature, reduction="none")
        close(got, expected, spread(student, teacher))


@examples
@given(logits(3))
def test_dual_kl_is_the_sum_of_two(triple: list[Tensor]) -> None:
    a, b, teacher = triple
    got = ops.dual_kl(a, b, teacher, 2.0, reduction="none")
    expected = ops.kl_div(a, teacher, 2.0, reduction="none") + ops.kl_div(b, teacher, 2.0, reduction="none")
    close(got, expected, spread(*triple))
    got = ops.dual_kl(a, b, teacher, direction="student", reduction="none")
    expected = ops.kl_div(teacher, a, reduction="none") + ops.kl_div(teacher, b, reduction="none")
    close(got, expected, spread(*triple))


@examples
@given(logits(1))
def test_entropy_lies_between_zero_and_log_c(one: list[Tensor]) -> None:
    values = ops.entropy(one[0], reduction="none")
    assert (values >= 0).all()
    assert (values <= math.log(one[0].shape[1]) * (1 + 1e-6) + 1e-6).all()


# --- divergences of many


@examples
@given(members())
def test_jsd_lies_between_zero_and_log_k(many: tuple[Tensor, Tensor]) -> None:
    given, weights = many
    values = ops.js_div(given, weights, reduction="none")
    assert (values >= 0).all()
    positive = int((weights > 0).sum())
    assert (values <= math.log(positive) * (1 + 1e-6) + 1e-6 * max(1.0, spread(given))).all()
    if positive == 1:
        assert (values <= 1e-6).all()


@examples
@given(members())
def test_jsd_of_equal_members_is_zero(many: tuple[Tensor, Tensor]) -> None:
    given, weights = many
    equal = given[:1].expand_as(given)
    assert (ops.js_div(equal, weights, reduction="none").abs() <= 1e-6).all()


@examples
@given(members(2), st.data())
def test_jsd_does_not_see_the_order(many: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    given, weights = many
    order = data.draw(orders(len(weights)))
    expected = ops.js_div(given, weights, reduction="none")
    close(ops.js_div(given[order], weights[order], reduction="none"), expected, spread(given))


@examples
@given(members())
def test_consensus_is_the_two_parts_of_jsd(many: tuple[Tensor, Tensor]) -> None:
    given, weights = many
    mixture, mean = ops.consensus(given, weights, reduction="none")
    close(mixture - mean, ops.js_div(given, weights, reduction="none"), spread(given))
    each = torch.stack([ops.entropy(x, reduction="none") for x in given])
    close(mean, (weights[:, None] * each).sum(0) / weights.sum(), spread(given))


@examples
@given(members())
def test_an_ensemble_of_equal_teachers_is_one_teacher(many: tuple[Tensor, Tensor]) -> None:
    given, weights = many
    student, teachers = given[0].flip(1), given[:1].expand_as(given)
    for mix in ("probs", "logits"):
        got = ops.ensemble_kl(student, teachers, weights, 2.0, mix=mix, reduction="none")
        close(got, ops.kl_div(student, given[0], 2.0, reduction="none"), spread(given))


@examples
@given(members(2), st.data())
def test_ensembles_do_not_see_the_order(many: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    given, weights = many
    student, order = given[0].flip(1), data.draw(orders(len(weights)))
    for mix in ("probs", "logits"):
        got = ops.ensemble_kl(student, given[order], weights[order], mix=mix, reduction="none")
        # fp32 keeps a mean of logits of size L to L times its precision, and probabilities move by as much.
        condition = max(1.0, spread(given) / 128) if mix == "logits" else 1.0
        close(got, ops.ensemble_kl(student, given, weights, mix=mix, reduction="none"), spread(given) * condition)


# --- blend and fuse


@examples
@given(tensors((3, 5), QUARTERS), tensors((4, 5), QUARTERS), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_blend_interpolates(foreground: Tensor, background: Tensor, picks: list[int]) -> None:
    index = torch.tensor(picks)
    assert torch.equal(ops.blend(foreground, background, 1.0, index=index), foreground)
    assert torch.equal(ops.blend(foreground, background, 0.0, index=index), background[index])
    half = ops.blend(foreground, background, 0.5, index=index)
    assert torch.equal(half, ops.blend(background[index], foreground, 0.5))


@examples
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
def test_fusing_is_concatenating(channels: list[int], last: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, c, 3, 4, generator=draw) for c in channels]
    if last:
        maps = [x.to(memory_format=torch.channels_last) for x in maps]
    assert torch.equal(ops.fuse_concat(maps), torch.cat(maps, 1))
    assert torch.equal(ops.fuse_concat(maps, activation="relu"), torch.cat(maps, 1).relu())
    one = maps[0]
    assert torch.equal(ops.fuse_mean([one]), one)
    torch.testing.assert_close(ops.fuse_mean([one] * 5), one)
