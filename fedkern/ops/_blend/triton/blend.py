"""blend in Triton: the forward pass, and both maps' gradients from one read of the result's gradient.

Computed in fp32 and rounded once. Sums over samples are taken in fp64, sorted by background row, without atomics: the
same bits every time.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedkern.ops._blend.kernels import BlendCall, Gradients, group_users, in_layout, output_strides
from fedkern.ops._blend.reference import check_values
from fedkern.ops._core.triton.launch import cdiv, double_bits, launch, power_of_two, processors
from fedkern.ops._core.triton.numbers import COMPUTE, double_of

# Elements that a program holds of each map: two 128-bit accesses per thread of four warps, in fp32.
TILE = 1024
# Sorted samples that a program reads at a time if many samples use the same row.
MANY = 16


@triton.jit
def _tile(columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.program_id(0)
    row = (program // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % columns).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    return row, column


@triton.jit
def _weight(alpha, value, row, stride, valid):
    weight = tl.zeros_like(row).to(tl.float64)
    if alpha is None:
        weight += double_of(value, tl.float64)
    else:
        weight += tl.load(alpha + row * stride, mask=valid, other=0).to(tl.float64)
    return weight


# The index is asserted on the device: reading it from the host would synchronise. With debug, which device assertions
# need, Triton would also guard every integer operation unless sanitize_overflow=False is given.
@triton.jit(debug=True, do_not_specialize=["value"])
def forward_kernel(
    foreground,
    background,
    index,
    alpha,
    value,
    out,
    rows,
    background_rows,
    size,
    foreground_stride,
    background_stride,
    alpha_stride,
    columns,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = _tile(columns, ROWS, COLUMNS)
    valid = row < rows
    source = row
    if index is not None:
        source = tl.load(index + row, mask=valid, other=0)
        inside = (source >= 0) & (source < background_rows)
        tl.device_assert(inside | ~valid, "blend: index out of range")
        valid = valid & inside
    weight = _weight(alpha, value, row, alpha_stride, valid)
    back_weight = (1.0 - weight).to(COMPUTE)[:, None]
    mask = valid[:, None] & (column < size)[None, :]
    x = tl.load(foreground + (row * foreground_stride)[:, None] + column[None, :], mask=mask, other=0)
    y = tl.load(background + (source * background_stride)[:, None] + column[None, :], mask=mask, other=0)
    mixed = weight.to(COMPUTE)[:, None] * x.to(COMPUTE) + back_weight * y.to(COMPUTE)
    tl.store(out + (row * size)[:, None] + column[None, :], mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["value"])
def backward_kernel(
    grad,
    order,
    start,
    alpha,
    value,
    to_front,
    to_back,
    rows,
    size,
    grad_stride,
    alpha_stride,
    columns,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the gradients of all users of a background row, and the row's, their sum."""
    row, column = _tile(columns, ROWS, COLUMNS)
    valid = row < rows
    if order is None:
        weight = _weight(alpha, value, row, alpha_stride, valid)
        mask = valid[:, None] & (column < size)[None, :]
        g = tl.load(grad + (row * grad_stride)[:, None] + column[None, :], mask=mask, other=0).to(COMPUTE)
        place = (row * size)[:, None] + column[None, :]
        if to_front is not None:
            tl.store(to_front + place, (weight.to(COMPUTE)[:, None] * g).to(to_front.dtype.element_ty), mask=mask)
        if to_back is not None:
            tl.store(to_back + place, ((1.0 - weight).to(COMPUTE)[:, None] * g).to(to_back.dtype.element_ty), mask=mask)
    else:
        begin = tl.load(start + row, mask=valid, other=0)
        count = tl.load(start + row + 1, mask=valid, other=0) - begin
        total = tl.zeros([ROWS, COLUMNS], tl.float64)
        entry = tl.arange(0, ENTRIES)[None, :]
        for k in range(0, tl.max(count, axis=0), ENTRIES):
            used = (k + entry) < count[:, None]
            sample = tl.load(order + begin[:, None] + k + entry, mask=used, other=0)
            weight = _weight(alpha, value, sample, alpha_stride, used)
            mask = used[:, :, None] & (column < size)[None, None, :]
            g = tl.load(grad + (sample * grad_stride)[:, :, None] + column[None, None, :], mask=mask, other=0)
            if to_front is not None:
                part = (weight.to(COMPUTE)[:, :, None] * g.to(COMPUTE)).to(to_front.dtype.element_ty)
                tl.store(to_front + (sample * size)[:, :, None] + column[None, None, :], part, mask=mask)
            total += tl.sum((1.0 - weight)[:, :, None] * g.to(COMPUTE).to(tl.float64), axis=1)
        mask = valid[:, None] & (column < size)[None, :]
        place = (row * size)[:, None] + column[None, :]
        tl.store(to_back + place, total.to(COMPUTE).to(to_back.dtype.element_ty), mask=mask)


@triton.jit
def alpha_kernel(
    grad,
    foreground,
    background,
    index,
    out,
    rows,
    size,
    grad_stride,
    foreground_stride,
    background_stride,
    splits,
    span,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute <grad, foreground - background> over ``span`` columns of each sample, in fp64."""
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = (program % splits).to(tl.int64)
    valid = row < rows
    source = row
    if index is not None:
        source = tl.load(index + row, mask=valid, other=0)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(split * span, tl.minimum((split + 1) * span, size), COLUMNS):
        column = (begin + tl.arange(0, COLUMNS))[None, :]
        mask = valid[:, None] & (column < size)
        g = tl.load(grad + (row * grad_stride)[:, None] + column, mask=mask, other=0).to(COMPUTE).to(tl.float64)
        x = tl.load(foreground + (row * foreground_stride)[:, None] + column, mask=mask, other=0).to(COMPUTE)
        y = tl.load(background + (source * background_stride)[:, None] + column, mask=mask, other=0).to(COMPUTE)
        total += g * (x.to(tl.float64) - y.to(tl.float64))
    tl.store(out + row * splits + split, tl.sum(total, axis=1), mask=valid)


def tile_shape(rows: int, size: int) -> tuple[int, int]:
    """Return rows and columns of a tile: a whole row (at most TILE columns), or several short rows."""
    columns = min(power_of_two(size), TILE)
    return min(TILE // columns, power_of_two(rows)), columns


class TritonBlend:
    """:class:`fedkern.ops._blend.kernels.BlendKernels` in Triton."""

    def forward(self, foreground: Tensor, background: Tensor, call: BlendCall) -> Tensor:
        alpha, value, index, background_rows = call
        shape, device = foreground.shape, foreground.device
        if device.type == "cpu":
            check_values(call)
        if foreground.is_contiguous() and background.is_contiguous():
            out = torch.empty_like(foreground, memory_format=torch.contiguous_format)
        else:
            strides = output_strides(shape, foreground.stride())
            out = torch.empty_strided(shape, strides, dtype=foreground.dtype, device=device)
            foreground, background = in_layout(foreground, strides), in_layout(background, strides)
        rows, size = shape[0], math.prod(shape[1:])
        if not rows or not size:
            return out
        steps = (foreground.stride(0), background.stride(0))
        if index is None and alpha is None and (rows == 1 or steps == (size, size)):
            rows, size, steps = 1, rows * size, (rows * size, rows * size)  # one row: any size stays aligned
        row_tile, column_tile = tile_shape(rows, size)
        columns = cdiv(size, column_tile)
        launch(
            forward_kernel, cdiv(rows, row_tile) * columns, device, foreground, background,
            None if index is None else index.contiguous(), alpha, double_bits(value), out, rows, background_rows, size,
            *steps, 0 if alpha is None else alpha.stride(0), columns, COMPUTE=COMPUTE[out.dtype], ROWS=row_tile,
            COLUMNS=column_tile, sanitize_overflow=False,
        )  # fmt: skip
        return out

    def backward(
        self, grad: Tensor, foreground: Tensor | None, background: Tensor | None, call: BlendCall,
        needs: Sequence[bool], strides: tuple[int, ...] | None = None,
    ) -> Gradients:  # fmt: skip
        alpha, _, index, background_rows = call
        shape, device = grad.shape, grad.device
        strides = output_strides(shape, grad.stride() if strides is None else strides)
        grad = in_layout(grad, strides)
        if index is not None:
            index = index.contiguous()
            call = call._replace(indices=index)
        to_front = torch.empty_strided(shape, strides, dtype=grad.dtype, device=device) if needs[0] else None
        to_back = None
        if needs[1]:
            to_back = torch.empty_strided((background_rows, *shape[1:]), strides, dtype=grad.dtype, device=device)
        self._maps(grad, call, to_front, to_back)
        by_alpha = None
        if needs[2]:
            assert foreground is not None
            assert background is not None
            assert alpha is not None
            foreground, background = in_layout(foreground, strides), in_layout(background, strides)
            by_alpha = self._alpha(grad, foreground, background, index).to(alpha.dtype)
        return to_front, to_back, by_alpha

    def _maps(self, grad: Tensor, call: BlendCall, to_front: Tensor | None, to_back: Tensor | None) -> None:
        alpha, value, index, _ = call
        samples, size = grad.shape[0], math.prod(grad.shape[1:])
        if to_front is None and to_back is None:
            return
        order = start = None
        rows, stride, entries = samples, grad.stride(0), 1
        if index is not None and to_back is not None:
            rows = to_back.shape[0]
            start, order = group_users(index, rows)
            entries = MANY if samples > 4 * rows else 1
        elif alpha is None and (samples == 1 or stride == size):
            rows, size, stride = min(samples, 1), samples * size, samples * size
        if not rows or not size:
            return
        row_tile, column_tile = tile_shape(rows, size)
        if entries > 1:
            row_tile, column_tile = 1, min(column_tile, TILE // entries)
        columns = cdiv(size, column_tile)
        launch(
            backward_kernel, cdiv(rows, row_tile) * columns, grad.device, grad, order, start, alpha, double_bits(value),
            to_front, to_back, rows, size, stride, 0 if alpha is None else alpha.stride(0), columns,
            COMPUTE=COMPUTE[grad.dtype], ROWS=row_tile, ENTRIES=entries, COLUMNS=column_tile,
        )  # fmt: skip

    def _alpha(self, grad: Tensor, foreground: Tensor, background: Tensor, index: Tensor | None) -> Tensor:
        rows, size = grad.shape[0], math.prod(grad.shape[1:])
        if not rows or not size:
            return torch.zeros(rows, dtype=torch.float64, device=grad.device)
        row_tile, column_tile = tile_shape(rows, size)
        # Enough programs for the device even if samples are few; their partial sums are added in a fixed order.
        tiles, groups = cdiv(size, column_tile), cdiv(rows, row_tile)
        splits = max(1, min(cdiv(tiles, 4), 4 * processors(grad.device) // groups))
        span = cdiv(tiles, splits) * column_tile
        splits = cdiv(size, span)
        partial = torch.empty(rows, splits, dtype=torch.float64, device=grad.device)
        launch(
            alpha_kernel, groups * splits, grad.device, grad, foreground, background, index, partial, rows, size,
            grad.stride(0), foreground.stride(0), background.stride(0), splits, span, COMPUTE=COMPUTE[grad.dtype],
            ROWS=row_tile, COLUMNS=column_tile,
        )  # fmt: skip
        return partial.sum(1) if splits > 1 else partial[:, 0]
