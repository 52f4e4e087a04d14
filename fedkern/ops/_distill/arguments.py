"""Arguments that the CPU and CUDA cores of the distill family share."""

from __future__ import annotations

from torch import Tensor

from fedkern.ops._core.backend import DTYPES, address
from fedkern.ops._distill.common import PROBS
from fedkern.ops._distill.kernels import Ensemble

# Operators as numbered in csrc/include/fedkern/distill.h
KL, LIMIT, ENTROPY = 0, 1, 2
# Operators as numbered in csrc/include/fedkern/distill_ensemble.h, after PROBS, LOGITS and MEAN
JS, CONSENSUS = 3, 4

# Settings of js_div and consensus, by reduction.
STACK = [Ensemble(1.0, PROBS, False, reduction) for reduction in range(3)]


def argument(x: Tensor | None) -> tuple[int | None, int, tuple[int, ...]] | None:
    """A tensor as a core takes it: pointer, dtype, strides."""
    return None if x is None else (address(x), DTYPES[x.dtype], x.stride())


def weight_gradient(raw: Tensor | None, grad: Tensor, scale: float, weight: Tensor | None) -> Tensor | None:
    """Gradient of the row weights, from the unweighted row losses ``raw``."""
    return None if raw is None or weight is None else (raw * grad.to(raw.dtype) * scale).to(weight.dtype)
