"""Tests of finite masks: a class of probability 0 adds only the other row's probability."""

import math

import pytest
import torch

from fedkern import ops
from python_tests.ops._distill.ensemble_cases import logits
from python_tests.ops._distill.finite_masks import CALLS, compare
from python_tests.ops.operator_cases import DTYPES


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
