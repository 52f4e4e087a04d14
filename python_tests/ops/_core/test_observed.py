"""What calls ask the choice of a backend for, as the benchmarks record it."""

from __future__ import annotations

import pytest
import torch

from fedkern import ops
from fedkern.ops._core import backend


def test_calls_are_observed_with_their_largest_size_and_as_before_afterwards() -> None:
    x, vectors = torch.randn(4, 3), torch.randn(2, 50)
    before = ops.entropy(x)
    with backend.observed() as asked:
        assert torch.equal(ops.entropy(x), before)
        ops.entropy(torch.randn(8, 3))
        ops.entropy(x)
        ops.weighted_mean(vectors, [1.0, 2.0])
        assert asked == {"entropy": 8 * 3 * 4, "aggregate": 2 * 50 * 4}
        assert not backend._chosen
        assert not backend._ordinary
    ops.entropy(torch.randn(100, 3))
    assert asked["entropy"] == 8 * 3 * 4
    assert ("entropy", "cpu") in backend._chosen


def test_gradients_transforms_and_errors_are_observed() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ZeroDivisionError), backend.observed() as asked:  # noqa: PT012
        ops.entropy(x).backward()
        assert asked.pop("entropy") == 48
        torch.func.grad(ops.entropy)(x.detach())
        assert asked == {"entropy": 48}
        raise ZeroDivisionError
    assert backend._observed is None
