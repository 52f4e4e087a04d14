"""The matrix products of contrastive on the CPU, by the faster of torch's two libraries.

Results go into given memory or come from an operator of oneDNN's own: autocast would round what ``mm`` alone returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

_mm = torch.mm
_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

# Multiplications from which oneDNN's longer calls pay.  Its fp32 products use AVX-512 on every CPU that has it, MKL's
# only on Intel's: half the time on others.  And their bits do not depend on the number of threads.
ONEDNN = 1 << 20


def _by_onednn(a: Tensor, size: int) -> bool:
    return a.dtype is torch.float32 and _linear is not None and a.shape[0] * a.shape[1] * size >= ONEDNN


def similarities(x: Tensor, y: Tensor) -> Tensor:
    """``x yᵀ``."""
    if _by_onednn(x, y.shape[0]):
        assert _linear is not None
        return _linear(x, y, None, "none", [], "")
    return _mm(x, y.t(), out=x.new_empty(x.shape[0], y.shape[0]))


def times(tile: Tensor, y: Tensor) -> Tensor:
    """``tile y``."""
    if _by_onednn(tile, y.shape[1]):
        assert _linear is not None
        return _linear(tile, y.t(), None, "none", [], "")
    return _mm(tile, y, out=y.new_empty(tile.shape[0], y.shape[1]))


def transposed_times(tile: Tensor, x: Tensor) -> Tensor:
    """``tileᵀ x``, perhaps as a transposed view: made as ``(xᵀ tile)ᵀ``, which spares oneDNN a copy of the tile."""
    if _by_onednn(tile, x.shape[1]):
        assert _linear is not None
        return _linear(x.t().contiguous(), tile.t(), None, "none", [], "").t()
    return _mm(tile.t(), x, out=x.new_empty(tile.shape[1], x.shape[1]))
