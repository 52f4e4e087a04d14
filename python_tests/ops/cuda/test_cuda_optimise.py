"""Tests of sgd_step and adamw_step on CUDA against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._core import backend


def step(shape: tuple[int, ...], device: torch.device, adamw: bool, terms: bool) -> list[Tensor]:
    """Return the tensors that a step writes to, and its results."""
    draw = torch.Generator().manual_seed(0)
    theta, g, moment, second, anchor, total = (torch.randn(shape, generator=draw).to(device) for _ in range(6))
    settings: dict[str, Any] = {"lr": 0.1}
    if terms:
        rates = [0.1, 0.2, 0.3] if len(shape) == 2 else 1
        shared = anchor[0] if len(shape) == 2 else anchor
        settings = {"lr": rates, "anchor": shared, "proximal": 0.3, "correction": anchor, "gradient_sum": total}
        settings |= {"weight_decay": 0.01, "max_norm": 2.0, "zero": True}
    if adamw:
        found = ops.adamw_step(theta, g, moment, second.abs_(), 3, **settings)
    else:
        found = ops.sgd_step(theta, g, moment if terms else None, momentum=0.9 if terms else 0.0, **settings)
    return [theta, g, moment, second, total, *found]


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("adamw", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1024,), (1030,), (3, 1000), (3, 1030)], ids=str)
def test_both_ways_to_the_kernel(device, monkeypatch, shape, adamw, terms):
    found = [step(shape, device, adamw, terms)]  # the general way, which opens the short one
    check, launchers = backend._ordinary["optimise"]
    answers: list[int] = []
    monkeypatch.setitem(
        backend._ordinary, "optimise", (lambda *given: answers.append(check(*given)) or answers[-1], launchers)
    )
    found.append(step(shape, device, adamw, terms))
    assert len(answers) == 1
    assert launchers[answers[0]] is not None
    with ops.use_backend("reference"):
        expected = step(shape, device, adamw, terms)
    for results in found:
        torch.testing.assert_close(results, expected)
    assert all(left.equal(right) for left, right in zip(*found, strict=True))


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("size", [1000, 1030])
def test_rows_of_one_block_tell_what_is_not_finite(device: torch.device, size: int, max_norm: float | None) -> None:
    """A single block writes a row's results itself.

    Several blocks leave them to another kernel.
    """
    theta, g = torch.zeros(3, size, device=device), torch.full((3, size), 2.0, device=device)
    g[1, -1], theta[2, 0] = torch.inf, torch.nan
    found = ops.sgd_step(theta, g, lr=0.5, max_norm=max_norm)
    assert found.finite.tolist() == [True, False, False]
    assert found.squared_norm.tolist() == [4.0 * size, torch.inf, 4.0 * size]
    torch.testing.assert_close(theta[0], torch.full_like(theta[0], -1.0 if max_norm is None else -0.5 / size**0.5))


def test_rates_in_a_tensor(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    theta, g = (torch.randn(3, 40, generator=draw).to(device) for _ in range(2))
    expected = theta - torch.tensor([[0.1], [0.2], [0.3]], device=device) * g
    ops.sgd_step(theta, g, lr=torch.tensor([0.1, 0.2, 0.3], device=device))
    torch.testing.assert_close(theta, expected)
