"""The distill operators under one signature, for tests that run through all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedkern import ops

OPERATORS = {
    "kl_div": (2, lambda x, **k: ops.kl_div(x[0], x[1], k.pop("temperature", 2.0), **k)),
    "dual_kl": (3, lambda x, **k: ops.dual_kl(*x, k.pop("temperature", 2.0), **k)),
    "dual_kl_student": (3, lambda x, **k: ops.dual_kl(*x, k.pop("temperature", 2.0), direction="student", **k)),
    "entropy": (1, lambda x, **k: ops.entropy(x[0], reduction=k.get("reduction", "batchmean"))),
}
each_operator = pytest.mark.parametrize("operator", OPERATORS)


def logits(count: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 2 for _ in range(count)]
