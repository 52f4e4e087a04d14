"""Optimisers against torch.optim, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern.models.optimisers import SGD, Adam

SHAPES = ((3, 4), (17,), (), (2, 3, 5, 5))
PAIRS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "plain": (lambda p: SGD(p, 0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (
        lambda p: SGD(p, 0.1, 0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01),
    ),
    "nesterov": (
        lambda p: SGD(p, 0.1, 0.9, weight_decay=0.01, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, nesterov=True),
    ),
    "adam": (lambda p: Adam(p, 0.1, (0.5, 0.999)), lambda p: torch.optim.Adam(p, 0.1, betas=(0.5, 0.999), fused=True)),
    "adam with decay": (
        lambda p: Adam(p, 0.1, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, fused=True),
    ),
    "adamw": (
        lambda p: Adam(p, 0.1, weight_decay=0.1, decoupled=True),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, fused=True),
    ),
}


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("name", PAIRS)
def test_to_the_last_bit(name: str) -> None:
    mine, theirs = draw(0), draw(0)
    ours, torchs = (make(tensors) for make, tensors in zip(PAIRS[name], (mine, theirs), strict=True))
    for step in range(5):
        gradients = draw(step + 1)
        for copies in (mine, theirs):
            for i, (tensor, gradient) in enumerate(zip(copies, gradients, strict=True)):
                tensor.grad = None if i == step else gradient.clone()  # another one has none in every step
        rate = 0.1 / (step + 1)
        ours.lr = torchs.param_groups[0]["lr"] = rate
        ours.step()
        torchs.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        kept = [tensor.grad for i, tensor in enumerate(mine) if i != step]
        assert all(torch.equal(a, b) for a, b in zip(kept, gradients[:step] + gradients[step + 1 :], strict=True))
    for a, b in zip(mine, theirs, strict=True):
        remembered = {key: value for key, value in torchs.state[b].items() if value is not None}
        assert ours.state.get(a, {}).keys() == remembered.keys()
        assert all(torch.equal(ours.state[a][key], value) for key, value in remembered.items())
    ours.zero_grad()
    assert all(tensor.grad is None for tensor in mine)
