"""Tests of contrastive on CUDA against the float64 reference."""

from typing import Any

import pytest
import torch

from fedkern import ops
from python_tests.ops._contrast.contrast_cases import AXES, check, embeddings
from python_tests.ops.operator_cases import describe, pairwise

CASES = [case for case in pairwise(AXES) if case["way"] != "onednn"]


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_loss_and_gradients(device: torch.device, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, device, monkeypatch)


def test_empty_and_single_batches(device: torch.device) -> None:
    for pairs in (0, 1):
        x = torch.ones(pairs, 4, device=device, requires_grad=True)
        loss = ops.contrastive(x, x.detach())
        loss.backward()
        assert loss.item() == 0
        assert not x.grad.any()


def test_similarities_of_minus_infinity_count_nothing(device: torch.device) -> None:
    x = torch.tensor([[1e20, 0.0], [0.0, 1.0]], device=device)
    y = torch.tensor([[1e-20, 0.0], [-1e30, 1.0]], device=device)
    got = ops.contrastive(x, y, 0.5)
    with ops.use_backend("reference"):
        torch.testing.assert_close(got, ops.contrastive(x, y, 0.5))


def test_a_temperature_that_is_not_above_zero_is_not_looked_at(device: torch.device) -> None:
    """A GPU would have to wait for the check.

    On the CPU such a temperature is an error.
    """
    x, y = (t.float().to(device) for t in embeddings(5, 3))
    below = torch.tensor(0.0, device=device)
    if device.type == "cuda":
        assert not ops.contrastive(x, y, below).isfinite()
    else:
        with pytest.raises(ValueError, match="temperature must be greater than 0"):
            ops.contrastive(x, y, below)
