"""contrastive on the CPU: torch multiplies, csrc/cpu/contrast.cpp computes loss and gradient from the products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkern.ops._contrast.kernels import Gradients
from fedkern.ops._contrast.products import similarities, times, transposed_times
from fedkern.ops._core.backend import DTYPES

# Most bytes of similarities that a call holds whole.  Reading them again costs less than multiplying again, until
# fresh memory costs more than either (measured: at D = 128 both take the same, at D = 512 holding saves a fifth).
HELD = 16 << 20
# Bytes of a tile of more similarities; a tile has at least LEAST_ROWS rows, enough for fast products.
TILE = 4 << 20
LEAST_ROWS = 128

# Looked up once: at 32 pairs the Python around the products takes longer than the products.
_threads = torch.get_num_threads

# Templates for empty_like, which takes two thirds of the time of empty(()).
_SCALARS = {dtype: torch.empty((), dtype=dtype) for dtype in DTYPES}


class _Batch(NamedTuple):
    """Contiguous embeddings in the computing dtype, and the settings of a call to the core."""

    x: Tensor
    y: Tensor
    code: int  # the core's code of the computing dtype
    scale: float  # 1 / temperature
    threads: int


class CpuContrast:
    """:class:`fedkern.ops._contrast.kernels.ContrastKernel` on ``fedkern._cpu``."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self._contrast = core.contrast_whole

    def loss(self, x: Tensor, y: Tensor, temperature: float | Tensor) -> Tensor:
        return self._loss(x, y, self._batch(x, y, temperature), None)

    def loss_and_sums(self, x: Tensor, y: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        batch = self._batch(x, y, temperature)
        sums = batch.x.new_empty(4, x.shape[0])
        return self._loss(x, y, batch, sums.data_ptr()), sums

    def loss_and_gradients(
        self, x: Tensor, y: Tensor, temperature: float | Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor, Gradients]:
        batch = self._batch(x, y, temperature)
        if not _fits(batch):
            sums = batch.x.new_empty(4, x.shape[0])
            return self._loss(x, y, batch, sums.data_ptr()), self._gradients(batch, sums, needs)
        held = similarities(batch.x, batch.y)
        loss = self._whole(x, y, batch, held, batch.scale / max(x.shape[0], 1), None)
        to_x = times(held, batch.y) if needs[0] or needs[2] else None
        to_y = transposed_times(held, batch.x).contiguous() if needs[1] else None
        return loss, self._with_temperature(batch, to_x, to_y, needs)

    def gradients(
        self, x: Tensor, y: Tensor, temperature: float | Tensor, sums: Tensor, needs: Sequence[bool]
    ) -> Gradients:
        return self._gradients(self._batch(x, y, temperature), sums, needs)

    def scaled(
        self, gradients: Sequence[Tensor | None], grad: Tensor, inputs: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        factor = grad.item()
        if factor != 1.0:
            gradients = [None if g is None else g * factor for g in gradients]
        return tuple(
            [
                g if g is None or t is None or g.dtype is t.dtype else g.to(t.dtype)
                for g, t in zip(gradients, inputs, strict=False)
            ]
        )

    def _batch(self, x: Tensor, y: Tensor, temperature: float | Tensor) -> _Batch:
        scale = 1.0 / (temperature if type(temperature) is float else float(temperature))
        compute = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
        # No detach(), which takes as long as a small product: autograd records nothing here.
        x, y = (t if t.dtype is compute and t.is_contiguous() else t.to(compute).contiguous() for t in (x, y))
        return _Batch(x, y, DTYPES[compute], scale, _threads())

    def _whole(self, x: Tensor, y: Tensor, batch: _Batch, held: Tensor, factor: float, sums: int | None) -> Tensor:
        """The loss from all similarities ``held``; if ``factor`` is not 0, overwrites ``held`` with its gradient."""
        a, b, code, scale, threads = batch
        count, size = a.shape
        value = self._contrast(
            code, count, size, a.data_ptr(), b.data_ptr(), held.data_ptr(), count, scale, factor, sums, threads
        )
        return _scalar(value, x, y)

    def _loss(self, x: Tensor, y: Tensor, batch: _Batch, sums: int | None) -> Tensor:
        a, b, code, scale, threads = batch
        if _fits(batch):
            return self._whole(x, y, batch, similarities(a, b), 0.0, sums)
        count = a.shape[0]
        bounded = self._bounded(batch)
        statistics = torch.empty(5, count, dtype=torch.float64)
        for first, rows in _tiles(a):
            tile = similarities(a[first : first + rows], b)
            where = (rows, count, tile.data_ptr(), count, first)
            self.core.contrast_sums(code, *where, scale, bounded, statistics.data_ptr(), threads)
        return _scalar(self.core.contrast_finish(code, count, scale, bounded, statistics.data_ptr(), sums), x, y)

    def _bounded(self, batch: _Batch) -> bool:
        x, y, code, scale, _ = batch
        return bool(self.core.contrast_bounded(code, *x.shape, x.data_ptr(), y.data_ptr(), scale))

    def _gradients(self, batch: _Batch, sums: Tensor, needs: Sequence[bool]) -> Gradients:
        """The gradients, from similarities that are multiplied again, tile by tile."""
        x, y, code, scale, threads = batch
        count = x.shape[0]
        bounded = self._bounded(batch)
        to_x = torch.empty_like(x) if needs[0] or needs[2] else None
        to_y = None
        for first, rows in _tiles(x):
            own = x[first : first + rows]
            tile = similarities(own, y)
            self.core.contrast_gradient(
                code,
                rows,
                count,
                tile.data_ptr(),
                count,
                first,
                scale,
                bounded,
                scale / count,
                sums.data_ptr(),
                threads,
            )
            if to_x is not None:
                to_x[first : first + rows] = times(tile, y)
            if needs[1]:
                more = transposed_times(tile, own)
                to_y = more if to_y is None else to_y.add_(more)
        if needs[1]:
            to_y = torch.empty_like(y) if to_y is None else to_y.contiguous()
        return self._with_temperature(batch, to_x, to_y, needs)

    def _with_temperature(
        self, batch: _Batch, to_x: Tensor | None, to_y: Tensor | None, needs: Sequence[bool]
    ) -> Gradients:
        """Adds the temperature's gradient, whose Σ G S is the sum of the products of x and the gradient of x."""
        to_temperature = None
        if needs[2] and to_x is not None:
            x = batch.x
            product = self.core.contrast_dot(batch.code, x.numel(), x.data_ptr(), to_x.data_ptr())
            to_temperature = torch.tensor(-batch.scale * product, dtype=x.dtype)
        return Gradients(to_x if needs[0] else None, to_y, to_temperature)


def _scalar(value: float, x: Tensor, y: Tensor) -> Tensor:
    dtype = x.dtype if x.dtype is y.dtype else torch.promote_types(x.dtype, y.dtype)
    return torch.empty_like(_SCALARS[dtype]).fill_(value)


def _fits(batch: _Batch) -> bool:
    count = batch.x.shape[0]
    return count * count * batch.x.element_size() <= HELD


def _tiles(x: Tensor) -> Iterator[tuple[int, int]]:
    """First row and row count of each tile of similarities."""
    count = x.shape[0]
    rows = max(LEAST_ROWS, TILE // max(count * x.element_size(), 1))
    for first in range(0, count, rows):
        yield first, min(rows, count - first)
