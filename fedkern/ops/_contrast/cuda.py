"""contrastive on CUDA: the kernels on tiles of similarities; the loop over the tiles is in tiles.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._contrast.tiles import Pairs, TiledContrast
from fedkern.ops._core.backend import DTYPES
from fedkern.ops._core.cuda import queue


class CudaContrast(TiledContrast):
    """:class:`fedkern.ops._contrast.kernels.ContrastKernel` on ``fedkern._cuda``."""

    def __init__(self, core: Any) -> None:
        self.core = core

    def block(self, dtype: torch.dtype) -> int:
        return int(self.core.contrast_block)

    def look(self, pairs: Pairs, tile: Tensor, first: int, pieces: Tensor, own: Tensor) -> None:
        self.core.contrast_look(_tile(pairs, tile, first), pieces.data_ptr(), own.data_ptr(), *queue(tile))

    def join(self, pairs: Pairs, pieces: Tensor, own: Tensor, sums: Tensor, loss: Tensor) -> None:
        losses = own.new_empty(2 * pairs.size, dtype=torch.float64)
        places = [x.data_ptr() for x in (pieces, own, sums, losses)]
        self.core.contrast_join(_tile(pairs, own, 0), *places, DTYPES[loss.dtype], loss.data_ptr(), *queue(loss))

    def gradient(self, pairs: Pairs, tile: Tensor, first: int, sums: Tensor) -> None:
        self.core.contrast_gradient(_tile(pairs, tile, first), sums.data_ptr(), *queue(tile))


def _tile(pairs: Pairs, tile: Tensor, first: int) -> tuple[int, int, int, int, int, int, int | None, float]:
    given = pairs.temperature
    address, value = (given.data_ptr(), 0.0) if isinstance(given, Tensor) else (None, given)
    return DTYPES[tile.dtype], tile.shape[0], pairs.size, tile.data_ptr(), tile.stride(0), first, address, value
