"""contrastive: the launcher of the CPU core.

torch multiplies, by the faster of oneDNN and MKL, and csrc/cpu/contrast.cpp computes loss and gradient from the
products. They use ``mm(out=...)`` or oneDNN's operator: autocast would round the result of a plain ``mm``.
"""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fedkern.ops._contrast.reference import ContrastCall, Gradients
from fedkern.ops._core.backend import DTYPES, compute_dtype
from fedkern.ops._core.launch import Launcher

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


# Most bytes of similarities that a call holds whole. Reading them again costs less than multiplying again, until
# fresh memory costs more than either (measured: at D = 128 both take the same, at D = 512 holding saves a fifth).
HELD = 16 << 20
# Bytes of a tile of more similarities; a tile has at least MIN_ROWS rows, enough for fast products.
TILE = 4 << 20
MIN_ROWS = 128

# Templates for empty_like, which takes two thirds of the time of empty(()).
_SCALARS = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in DTYPES}


class _Batch(NamedTuple):
    x: Tensor
    y: Tensor
    scale: float
    dtype: torch.dtype


class CpuContrast(Launcher):
    """contrastive of ``fedkern._cpu``, which returns the loss as a number and takes tiles of any height.

    Sums are taken in float32 (float64 for a float64 input) and rounded once.
    """

    def __init__(self, core: ModuleType) -> None:
        super().__init__(core)
        self._contrast = core.contrast_whole

    def loss(self, call: ContrastCall) -> Tensor:
        return self._loss(_batch(call), None)

    def loss_and_gradients(self, call: ContrastCall, needs: Sequence[bool]) -> tuple[Tensor, Gradients]:
        batch = _batch(call)
        if not _fits(batch):
            sums = batch.x.new_empty(4, batch.x.shape[0])
            return self._loss(batch, sums), self._gradients(batch, sums, needs)
        matrix = similarities(batch.x, batch.y)
        loss = self._whole(batch, matrix, batch.scale / max(batch.x.shape[0], 1))
        to_x = times(matrix, batch.y) if needs[0] or needs[2] else None
        to_y = transposed_times(matrix, batch.x).contiguous() if needs[1] else None
        return loss, self._with_temperature(batch, to_x, to_y, needs)

    def scale_gradients(
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

    def _whole(self, batch: _Batch, matrix: Tensor, factor: float) -> Tensor:
        """Return the loss from all similarities, which the gradient overwrites if ``factor`` is not 0."""
        x, y, scale, dtype = batch
        return _scalar(self._contrast(x, y, matrix, scale, factor, None, self.at(x)), dtype)

    def _loss(self, batch: _Batch, sums: Tensor | None) -> Tensor:
        """Return the loss, and store the maxima and sums of rows, then of columns, in ``sums [4, B]``.

        A softmax is ``exp((x yᵀ - maximum) / temperature) / sum``.
        """
        x, y, scale, dtype = batch
        if _fits(batch):
            return self._whole(batch, similarities(x, y), 0.0)
        bounded = self.core.contrast_bounded(x, y, scale)
        statistics = x.new_empty(5, x.shape[0], dtype=torch.float64)
        for begin, rows in _tiles(x):
            tile = similarities(x[begin : begin + rows], y)
            self.core.contrast_sums(tile, begin, scale, bounded, statistics, self.at(x))
        return _scalar(self.core.contrast_finish(scale, bounded, statistics, sums), dtype)

    def _gradients(self, batch: _Batch, sums: Tensor, needs: Sequence[bool]) -> Gradients:
        x, y, scale, _ = batch
        factor, bounded = scale / max(x.shape[0], 1), self.core.contrast_bounded(x, y, scale)
        to_x = torch.empty_like(x) if needs[0] or needs[2] else None
        to_y = None
        for begin, rows in _tiles(x):
            block = x[begin : begin + rows]
            tile = similarities(block, y)
            self.core.contrast_gradient(tile, begin, scale, bounded, factor, sums, self.at(x))
            if to_x is not None:
                to_x[begin : begin + rows] = times(tile, y)
            if needs[1]:
                part = transposed_times(tile, block)
                to_y = part if to_y is None else to_y.add_(part)
        if needs[1]:
            to_y = torch.empty_like(y) if to_y is None else to_y.contiguous()
        return self._with_temperature(batch, to_x, to_y, needs)

    def _with_temperature(
        self, batch: _Batch, to_x: Tensor | None, to_y: Tensor | None, needs: Sequence[bool]
    ) -> Gradients:
        """Add the temperature's gradient: Σ G S is the sum of the products of x and the gradient of x."""
        to_temperature = None
        if needs[2] and to_x is not None:
            product = self.core.contrast_dot(batch.x, to_x)
            to_temperature = torch.tensor(-batch.scale * product, dtype=to_x.dtype, device="cpu")
        return Gradients(to_x if needs[0] else None, to_y, to_temperature)


def _batch(call: ContrastCall) -> _Batch:
    x, y, temperature = call
    scale = 1.0 / (temperature if type(temperature) is float else float(temperature))
    dtype = x.dtype if x.dtype is y.dtype else torch.promote_types(x.dtype, y.dtype)
    compute = compute_dtype(dtype)
    # No detach(), which takes as long as a small product: autograd records nothing here.
    x, y = (t if t.dtype is compute and t.is_contiguous() else t.to(compute).contiguous() for t in (x, y))
    return _Batch(x, y, scale, dtype)


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(_SCALARS[dtype]).fill_(value)


def _fits(batch: _Batch) -> bool:
    count = batch.x.shape[0]
    return count * count * batch.x.element_size() <= HELD


def _tiles(x: Tensor) -> Iterator[tuple[int, int]]:
    count = x.shape[0]
    rows = max(MIN_ROWS, TILE // max(count * x.element_size(), 1))
    for begin in range(0, count, rows):
        yield begin, min(rows, count - begin)
