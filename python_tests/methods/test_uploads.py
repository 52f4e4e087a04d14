"""Declarations of uploads, and refusals of uploads that differ from them."""

import re

import pytest
import torch

from fedkern.methods.uploads import Maybe, Number, Values, all_finite, why_refused


def test_named_sizes_must_agree():
    declared = {"classes": Values(("n",), torch.int64, low=0, high=4), "means": Values(("n", 3))}
    good = {"classes": torch.tensor([1, 4]), "means": torch.zeros(2, 3)}
    assert why_refused(good, declared) == ""
    assert why_refused({"classes": torch.zeros(0, dtype=torch.int64), "means": torch.zeros(0, 3)}, declared) == ""
    said = why_refused({**good, "means": torch.zeros(1, 3)}, declared)
    assert said == "has means of shape [1, 3] and torch.float32 where shape [2, 3] and torch.float32 are expected"
    assert (
        why_refused({**good, "classes": torch.tensor([-1, 4])}, declared) == "has classes with -1 where 0 is the least"
    )
    assert "where 4 is the largest" in why_refused({**good, "classes": torch.tensor([1, 5])}, declared)


def test_numbers_have_a_range():
    assert why_refused({"n": 3}, {"n": Number(low=1, integer=True)}) == ""
    assert why_refused({"n": 0}, {"n": Number(low=1, integer=True)}).startswith("has n 0 where a number from 1 to any")
    assert why_refused({"n": 2.5}, {"n": Number(integer=True)}) == "has float n where an integer is expected"
    assert why_refused({}, {"n": Maybe(Number())}) == ""


def test_long_names_are_cut():
    said = why_refused({"x" * 200_000: 1}, {})
    assert re.fullmatch(r"should not hold x{76} \.\.\.", said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_all_finite(dtype):
    large = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)  # a sum that overflows
    assert all_finite(large)
    assert all_finite(large[:0])
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = large.clone()
        spoiled[1, 2] = bad
        assert not all_finite(spoiled)
    infinite = torch.zeros(4, dtype=dtype)
    infinite[0], infinite[1] = torch.inf, -torch.inf
    assert not all_finite(infinite)
    assert all_finite(torch.zeros(2, dtype=torch.int64))
