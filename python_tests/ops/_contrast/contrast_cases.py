"""Cases of contrastive for every backend: pairs of embeddings in many shapes, and the expected results."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedkern import ops
from fedkern.ops._contrast import kernels as contrast_kernels
from fedkern.ops._contrast import kernels as contrast_products
from fedkern.ops._contrast import tiled as contrast_tiled
from fedkern.ops._contrast.reference import contrastive_reference
from python_tests.ops.operator_cases import DTYPES, assert_close, move_to

AXES: dict[str, Any] = {
    "pairs": (1, 2, 3, 31, 64, 65, 130),
    "size": (1, 5, 64),
    "dtype": DTYPES,
    "temperature": (1.0, 0.07, 0.005),
    "length": (1.0, 6.0),
    "learnt": (False, True),
    "layout": ("contiguous", "transposed", "gaps", "expanded"),
    "needs": ("both", "x", "y", "temperature"),
    "way": ("held", "tiles", "onednn"),
    "grad": (1.0, -2.5),
}


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force a way that is meant for large calls on calls of any size."""
    if way == "tiles":
        for module in (contrast_kernels, contrast_tiled):
            monkeypatch.setattr(module, "HELD", 0)
            monkeypatch.setattr(module, "TILE", 1 << 14)
        monkeypatch.setattr(contrast_kernels, "MIN_ROWS", 7)
    if way == "onednn":
        monkeypatch.setattr(contrast_products, "ONEDNN", 0)


def embeddings(pairs: int, size: int, length: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return partners that are nearer to each other than to others."""
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(pairs, size, generator=draw, dtype=torch.float64) for _ in range(2))
    return normalize(x, dim=1) * length, normalize(x + y, dim=1) * length


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "gaps":
        return torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(1)[:, : x.shape[1]]
    return x[:1].expand(x.shape) if layout == "expanded" else x


def check(case: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare loss and gradients with the float64 reference of the very same inputs."""
    choose(case["way"], monkeypatch)
    dtype, needs = case["dtype"], case["needs"]
    x, y = (lay_out(t.to(dtype), case["layout"]) for t in embeddings(case["pairs"], case["size"], case["length"]))
    learnt = case["learnt"] or needs == "temperature"
    # In half precision the temperature is what it rounds to.
    given: Any = torch.tensor(case["temperature"], dtype=dtype) if learnt else case["temperature"]
    x, y = (move_to(t, device).requires_grad_(needs in (name, "both")) for t, name in ((x, "x"), (y, "y")))
    temperature = given.to(device).requires_grad_(needs in ("temperature", "both")) if learnt else given
    inputs = [x, y, *([temperature] if learnt else [])]
    exact = [t.detach().cpu().double().requires_grad_(t.requires_grad) for t in inputs]
    loss = ops.contrastive(x, y, temperature)
    expected = contrastive_reference(*exact[:2], exact[2] if learnt else given)
    assert loss.dtype is dtype
    assert not loss.dim()
    scale = 1.0 / case["temperature"]
    similarities = exact[0].detach() @ exact[1].detach().T * scale
    spread = max(1.0, float(similarities.max() - similarities.min())) if similarities.numel() else 1.0
    assert_close("loss", loss.cpu(), expected, absolute=1e-6 * spread)
    (loss * case["grad"]).backward()
    (expected * case["grad"]).backward()
    # The chain rule's factors beside the softmaxes, whose errors the tolerance is about.
    factor = 2.5 * spread * max(1.0, scale * case["length"])
    for name, ours, theirs in zip("xyt", inputs, exact, strict=False):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert theirs.grad is not None
            assert ours.grad.dtype is dtype
            # The temperature's is a sum of similarities, whose common part cancels.
            cancelling = max(1.0, float(similarities.abs().max())) * scale if name == "t" else 1.0
            assert_close(f"gradient of {name}", ours.grad.cpu(), theirs.grad, absolute=1e-6 * factor * cancelling)
