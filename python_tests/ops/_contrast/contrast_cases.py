"""Embeddings for contrastive, and its ways for large calls forced on any."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedkern.ops._contrast import kernels as contrast_kernels
from fedkern.ops._contrast import tiled as contrast_tiled


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force a way that is meant for large calls on calls of any size."""
    if way == "tiles":
        for module in (contrast_kernels, contrast_tiled):
            monkeypatch.setattr(module, "HELD", 0)
            monkeypatch.setattr(module, "TILE", 1 << 14)
        monkeypatch.setattr(contrast_kernels, "MIN_ROWS", 7)
    if way == "onednn":
        monkeypatch.setattr(contrast_kernels, "ONEDNN", 1)


def embeddings(pairs: int, size: int, length: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return partners that are nearer to each other than to others."""
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(pairs, size, generator=draw, dtype=torch.float64) for _ in range(2))
    return normalize(x, dim=1) * length, normalize(x + y, dim=1) * length
