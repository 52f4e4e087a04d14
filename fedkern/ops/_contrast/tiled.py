"""contrastive on a GPU: torch multiplies tiles of similarities, three kernels of the CUDA core process them.

Nothing here reads a tensor's value, because that would synchronise.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedkern.ops._contrast.reference import ContrastCall, Gradients
from fedkern.ops._core.backend import compute_dtype
from fedkern.ops._core.launch import Launcher

# Most bytes of similarities that a call holds whole (8,192 pairs in fp32), and bytes of a tile of more.
HELD = 256 << 20
TILE = 64 << 20


class Pairs(NamedTuple):
    x: Tensor
    y: Tensor
    temperature: float | Tensor
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return self.x.shape[0]


class CudaContrast(Launcher):
    """contrastive of ``fedkern._cuda``, with the methods of :class:`fedkern.ops._contrast.kernels.CpuContrast`."""

    def loss(self, call: ContrastCall) -> Tensor:
        pairs = _pairs(call)
        return self._sums(pairs, self._memory(pairs))[0]

    def loss_and_gradients(self, call: ContrastCall, needs: Sequence[bool]) -> tuple[Tensor, Gradients]:
        pairs = _pairs(call)
        memory = self._memory(pairs)
        loss, sums = self._sums(pairs, memory)
        return loss, self._gradients(pairs, sums, needs, memory, ready=memory.shape[0] == pairs.size)

    def scale_gradients(
        self, gradients: Sequence[Tensor | None], grad: Tensor, inputs: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        pairs = zip(gradients, inputs, strict=False)
        return tuple([None if g is None or t is None else (g * grad).to(t.dtype) for g, t in pairs])

    def _memory(self, pairs: Pairs) -> Tensor:
        count, dtype = pairs.size, pairs.x.dtype
        rows = count
        if count * count * dtype.itemsize > HELD:
            block = int(self.core.contrast_block)
            rows = min(count, max(TILE // (count * dtype.itemsize) // block, 1) * block)
        return pairs.x.new_empty(rows, count)

    def _tiles(self, pairs: Pairs, memory: Tensor) -> Iterator[tuple[int, Tensor]]:
        for begin in range(0, pairs.size, max(memory.shape[0], 1)):
            yield begin, memory[: pairs.size - begin]

    def _sums(self, pairs: Pairs, memory: Tensor) -> tuple[Tensor, Tensor]:
        count = pairs.size
        sums = pairs.x.new_empty(4, count)
        loss = pairs.x.new_zeros((), dtype=pairs.dtype)
        if not count:
            return loss, sums
        # Maxima and sums of the blocks: for the rows by blocks of columns, then for the columns by blocks of rows.
        blocks = -(-count // int(self.core.contrast_block))
        pieces, partners = pairs.x.new_empty(2, blocks, 2 * count), pairs.x.new_empty(count)
        for begin, tile in self._tiles(pairs, memory):
            # With out=, which autocast leaves alone.
            torch.mm(pairs.x[begin : begin + tile.shape[0]], pairs.y.t(), out=tile)
            self.core.contrast_look(tile, begin, pairs.temperature, pieces, partners, self.at(tile))
        losses = partners.new_empty(2 * count, dtype=torch.float64)
        self.core.contrast_join(pairs.temperature, pieces, partners, sums, losses, loss, self.at(loss))
        return loss, sums

    def _gradients(self, pairs: Pairs, sums: Tensor, needs: Sequence[bool], memory: Tensor, ready: bool) -> Gradients:
        x, y, temperature, _ = pairs
        to_x = torch.empty_like(x) if needs[0] or needs[2] else None
        to_y = torch.zeros_like(y) if needs[1] else None
        for begin, tile in self._tiles(pairs, memory):
            block = x[begin : begin + tile.shape[0]]
            if not ready:
                torch.mm(block, y.t(), out=tile)
            self.core.contrast_gradient(tile, begin, pairs.temperature, sums, self.at(tile))
            if to_x is not None:
                torch.mm(tile, y, out=to_x[begin : begin + tile.shape[0]])
            if to_y is not None:
                if tile.shape[0] == pairs.size:
                    torch.mm(tile.t(), block, out=to_y)
                else:
                    torch.addmm(to_y, tile.t(), block, out=to_y)
        to_temperature = None
        if needs[2] and to_x is not None:
            # Σ G S in the temperature's gradient is the sum of the products of x and the gradient of x.
            to_temperature = (-(x * to_x).sum(dtype=torch.float64) / temperature).to(x.dtype)
        return Gradients(to_x if needs[0] else None, to_y, to_temperature)


def _pairs(call: ContrastCall) -> Pairs:
    x, y, temperature = call
    dtype = torch.promote_types(x.dtype, y.dtype)
    compute = compute_dtype(dtype)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(compute)
    return Pairs(x.detach().to(compute).contiguous(), y.detach().to(compute).contiguous(), temperature, dtype)
