"""Matrix products of contrastive on the CPU, by the faster of oneDNN and MKL.

They use ``mm(out=...)`` or oneDNN's operator: autocast would round the result of a plain ``mm``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_mm = torch.mm
_HAS_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_linear: Callable[..., Tensor] = getattr(torch.ops.mkldnn, "_linear_pointwise", _mm)

# Multiplications from which oneDNN makes up for its slower call. oneDNN uses AVX-512 for fp32 on every CPU that has
# it, MKL only on Intel's; on other CPUs oneDNN takes half the time. Its bits do not depend on the number of threads.
ONEDNN = 1 << 20


def _by_onednn(a: Tensor, size: int) -> bool:
    return a.dtype is torch.float32 and _HAS_LINEAR and a.shape[0] * a.shape[1] * size >= ONEDNN


def similarities(x: Tensor, y: Tensor) -> Tensor:
    """Compute ``x yᵀ``."""
    if _by_onednn(x, y.shape[0]):
        return _linear(x, y, None, "none", [], "")
    return _mm(x, y.t(), out=x.new_empty(x.shape[0], y.shape[0]))


def times(tile: Tensor, y: Tensor) -> Tensor:
    """Compute ``tile y``."""
    if _by_onednn(tile, y.shape[1]):
        return _linear(tile, y.t(), None, "none", [], "")
    return _mm(tile, y, out=y.new_empty(tile.shape[0], y.shape[1]))


def transposed_times(tile: Tensor, x: Tensor) -> Tensor:
    """Compute ``tileᵀ x``, with oneDNN as the view ``(xᵀ tile)ᵀ``, which saves a copy."""
    if _by_onednn(tile, x.shape[1]):
        return _linear(x.t().contiguous(), tile.t(), None, "none", [], "").t()
    return _mm(tile.t(), x, out=x.new_empty(tile.shape[1], x.shape[1]))
