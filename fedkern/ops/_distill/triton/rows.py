"""Helpers of the row losses: rows of logits in memory, softmax pieces, and the sum over rows.

A *row* is one sample at one position, its classes ``class_stride`` elements from each other. There are ``outer`` times
``inner`` rows: batches times positions, or 1 times all rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedkern.ops._core.triton.launch import cdiv, power_of_two, processors
from fedkern.ops._core.triton.numbers import COMPUTE, double_of, join, narrow
from fedkern.ops._distill.rows import NONE

# Terms of the series of e^u - 1 - u on |u| < 1/2.
SERIES = {torch.float32: 9, torch.float64: 15}

# Elements of one tensor's tile. With four warps a thread holds 16 of each, and no kernel here spills (sm_90).
TILE = 2048
# Warps of kernels with K teachers: two elements of a tile to a thread, since these kernels hold several tiles at once
# and would spill.
STACK_WARPS = 8
# The longest row that is held whole. Longer rows are read in pieces, twice, the second time mostly from the L2.
WHOLE = 4096
# Adjacent rows of a tile if rows are adjacent in memory and classes are not: at least 128 bytes of fp32.
BESIDE = 32


@triton.jit
def rows_of(tile, tiles, inner, ROWS: tl.constexpr):
    """Return a tile's rows: batch, places in the batch, mask, and places among all rows."""
    # Products with strides need 64 bits; the division does not, and is several times as fast in 32 bits.
    batch = (tile // tiles).to(tl.int64)
    inside = (tile % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return batch, inside, inside < inner, batch * inner + inside


@triton.jit
def piece(begin, last, valid, COLUMNS: tl.constexpr):
    """Return the classes of a tile from ``begin`` on, and the mask of elements before ``last``."""
    column = (begin + tl.arange(0, COLUMNS)).to(tl.int64)
    return column, valid[:, None] & (column < last)[None, :]


@triton.jit
def ones_or(x, batch, inside, outer_stride, row_stride, valid, COMPUTE: tl.constexpr):
    """Return a weight or a gradient for each row, 1 if ``x`` is None."""
    number = tl.zeros(valid.shape, COMPUTE) + 1.0
    if x is not None:
        number = tl.load(x + batch * outer_stride + inside * row_stride, mask=valid, other=0).to(COMPUTE)
    return number


@triton.jit
def load_tile(x, offset, class_stride, column, mask, classes, COMPUTE: tl.constexpr):
    """Load logits ``[ROWS, COLUMNS]`` in the computing dtype, -inf past the last class."""
    # A 16-bit load with another default than 0 fails in the interpreter.
    value = tl.load(x + offset[:, None] + (column * class_stride)[None, :], mask=mask, other=0).to(COMPUTE)
    return tl.where((column < classes)[None, :], value, float("-inf"))


@triton.jit
def softmax_of(x, scale):
    """Return each row's maximum and the logarithm of its sum of exponentials."""
    top = tl.max(x, axis=1)
    return top, tl.log(tl.sum(tl.exp((x - top[:, None]) * scale), axis=1))


@triton.jit
def scan(
    x, offset, class_stride, valid, start, last, classes, scale,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute :func:`softmax_of` the classes from ``start`` to ``last``, by pieces, without the sum's logarithm."""
    top = tl.full([ROWS], float("-inf"), COMPUTE)
    total = tl.zeros([ROWS], COMPUTE)
    for begin in range(start, last, COLUMNS):
        column, mask = piece(begin, classes, valid, COLUMNS)
        tile = load_tile(x, offset, class_stride, column, mask, classes, COMPUTE)
        new = tl.max(tile, axis=1)
        base = tl.where(new == float("-inf"), 0.0, new)
        top, total = join(top, total, new, tl.sum(tl.exp((tile - base[:, None]) * scale), axis=1), scale)
    return top, total


@triton.jit(do_not_specialize=["temperature"])
def statistics_kernel(
    x, tops, totals, temperature, inner, classes, tiles, splits, span, outer_stride, row_stride, class_stride,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store :func:`scan` of one part of each row, for rows that several programs share."""
    program = tl.program_id(0)
    split = program % splits
    group = (program // splits).to(tl.int64)
    inside = group % tiles * ROWS + tl.arange(0, ROWS)
    valid = inside < inner
    offset = group // tiles * outer_stride + inside * row_stride
    scale = 1.0 / double_of(temperature, COMPUTE)
    start = split * span
    top, total = scan(
        x, offset, class_stride, valid, start, tl.minimum(start + span, classes), classes, scale,
        COMPUTE, ROWS, COLUMNS,
    )  # fmt: skip
    place = (group // tiles * inner + inside) * splits + split
    tl.store(tops + place, top, mask=valid)
    tl.store(totals + place, total, mask=valid)


@triton.jit
def gather(tops, totals, row, valid, splits, scale, SPLITS: tl.constexpr):
    """Return :func:`softmax_of` whole rows, from the results of :func:`statistics_kernel` for their parts."""
    part = tl.arange(0, SPLITS)
    mask = valid[:, None] & (part < splits)[None, :]
    place = (row * splits)[:, None] + part[None, :]
    top = tl.load(tops + place, mask=mask, other=0)
    total = tl.load(totals + place, mask=mask, other=0)
    top = tl.where((part < splits)[None, :], top, float("-inf"))
    row_top = tl.max(top, axis=1)
    base = tl.where(row_top == float("-inf"), 0.0, row_top)
    return row_top, tl.log(tl.sum(total * tl.exp((top - base[:, None]) * scale), axis=1))


@triton.jit
def expm1_less(u, TERMS: tl.constexpr):
    """Compute ``e**u - 1 - u`` for ``|u| < 1/2`` by its series."""
    sum_ = tl.zeros_like(u) + 1.0
    for k in tl.static_range(TERMS, 2, -1):
        sum_ = sum_ * (u * (1.0 / k)) + 1.0
    return u * u * 0.5 * sum_


@triton.jit
def log1p(r, TERMS: tl.constexpr):
    """Compute ``log(1 + r)``, ``-1/2 < r < 1``, as the series of ``2 artanh(r / (2 + r))``: accurate for a small r."""
    s = r / (2.0 + r)
    sum_ = tl.zeros_like(r) + 1.0 / (2 * TERMS + 1)
    for k in tl.static_range(TERMS - 1, -1, -1):
        sum_ = sum_ * (s * s) + 1.0 / (2 * k + 1)
    return 2.0 * s * sum_


@triton.jit
def store_total(total, program, values, valid, count, MEAN: tl.constexpr):
    """Store the sum of the program's ``values`` in fp64, over ``count`` if MEAN."""
    sum_ = tl.sum(tl.where(valid, values, 0.0).to(tl.float64), axis=0)
    if MEAN:
        sum_ = sum_ / count
    tl.store(total + program, narrow(sum_, total))


class Steps(NamedTuple):
    """Strides from batch to batch, row to row and class to class."""

    outer: int
    row: int
    column: int


class Rows(NamedTuple):
    """Division of the rows among the ``outer * tiles * splits`` programs of a launch."""

    outer: int
    inner: int
    classes: int
    tiles: int
    row_tile: int
    column_tile: int
    splits: int
    span: int

    @property
    def whole(self) -> bool:
        return self.column_tile >= self.classes

    @property
    def groups(self) -> int:
        return self.outer * self.tiles

    @property
    def warps(self) -> int:
        return 8 if self.row_tile * self.column_tile > TILE else 4


# Strides of one number for all rows.
ALL_ROWS = Steps(0, 0, 0)


def meta_of(plan: Rows, compute: torch.dtype, *, stack: bool = False) -> dict[str, Any]:
    """Return compile-time arguments of the kernels of rows, or (``stack``) of K teachers' rows.

    With a limit to a thread's registers (``maxnreg``) ptxas spills none; otherwise a few, for occupancy.
    """
    return {
        "COMPUTE": COMPUTE[compute],
        "ROWS": plan.row_tile,
        "COLUMNS": plan.column_tile,
        "num_warps": STACK_WARPS if stack else plan.warps,
        "maxnreg": 128 if stack and compute is torch.float32 else 255,
    }


def steps_of(x: Tensor, axis: int = 1) -> Steps | None:
    """Return the strides of ``[B, C, *positions]`` (``axis`` 1) or ``[K, B, C, *positions]`` (``axis`` 2).

    None if no single stride leads through the positions.
    """
    shape, strides = x.shape, x.stride()
    row, size = 0, 1
    for place in range(len(shape) - 1, axis, -1):
        if shape[place] == 1:
            continue
        if size == 1:
            row = strides[place]
        elif strides[place] != row * size:
            return None
        size *= shape[place]
    return Steps(strides[axis - 1], row, strides[axis])


def row_steps_of(x: Tensor | None) -> Steps | None:
    return ALL_ROWS if x is None else steps_of(x.unsqueeze(1))


def make_readable(x: Tensor, gradient: Tensor | None = None, axis: int = 1) -> Tensor:
    """Return ``x``, copied if no single stride leads through its positions, or the gradient's differ."""
    if gradient is not None and x.stride() != gradient.stride():
        return torch.empty_like(gradient, dtype=x.dtype).copy_(x)
    return x if x.dim() == axis + 1 or steps_of(x, axis) is not None else x.contiguous()


def make_rows_readable(x: Tensor | None) -> Tensor | None:
    """Return a number per row, or one for all, copied if no single stride leads through the positions."""
    return x if x is None or not x.dim() or row_steps_of(x) is not None else x.contiguous()


def known_steps(x: Tensor | None, axis: int = 1) -> Steps:
    if x is None:
        return ALL_ROWS
    steps = steps_of(x, axis)
    assert steps is not None
    return steps


def zero_all(*tensors: Tensor | None) -> None:
    for x in tensors:
        if x is not None:
            x.zero_()


def totals_of(result: Tensor | None, reduction: int, plan: Rows) -> Tensor | None:
    """Return memory for the programs' sums, the result itself if there is only one program."""
    if result is None or reduction == NONE:
        return None
    return result if plan.groups == 1 else torch.empty(plan.groups, dtype=torch.float64, device=result.device)


def make_writable(gradient: Tensor | None, axis: int = 1) -> Tensor | None:
    """Return ``gradient``, or a contiguous tensor for a kernel to write, which :func:`hand_over` copies.

    Gradients are written where the logits are read, so a single stride must lead through the positions.
    """
    if gradient is None or gradient.dim() == axis + 1 or steps_of(gradient, axis) is not None:
        return gradient
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


def hand_over(written: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    for source, target in zip(written, gradients, strict=True):
        if source is not None and target is not None and source is not target:
            target.copy_(source)


def plan_rows(logits: Tensor, steps: Sequence[Steps], tensors: int, compute: torch.dtype) -> tuple[Rows, list[Steps]]:
    """Cut rows into tiles, and merge batches and positions into one axis if the strides of all tensors allow.

    Args:
        steps: strides of every tensor that takes part.
        tensors: tiles of logits that a program holds at once; the more, the smaller. Mixtures count as four.
    """
    shape = logits.shape
    outer, classes, inner = shape[0], shape[1], shape[2:].numel()
    if inner == 1:
        outer, inner = 1, outer
        steps = [Steps(0, s.outer, s.column) for s in steps]
    elif all(s.outer == inner * s.row for s in steps):
        outer, inner = 1, outer * inner
        steps = [Steps(0, s.row, s.column) for s in steps]
    elements = TILE if tensors <= 2 else TILE // 2 if tensors == 3 else TILE // 4
    if compute is torch.float64:
        elements //= 2
    longest = WHOLE * elements // TILE
    columns, beside = power_of_two(classes), steps[0].column != 1 and inner > 1
    if beside:
        longest = elements // min(BESIDE, power_of_two(inner))
    columns = min(columns, longest)
    rows = max(1, elements // columns)
    units = processors(logits.device)
    if outer * inner * columns > elements:  # more than one program: then one for every processor, if rows suffice
        rows = min(rows, max(power_of_two(cdiv(outer * inner, units)), BESIDE if beside else 1))
    rows = min(rows, power_of_two(inner))
    tiles = cdiv(inner, rows)
    splits, span = 1, classes
    if columns < classes and outer * tiles < units:
        pieces = cdiv(classes, columns)
        span = cdiv(pieces, min(cdiv(2 * units, outer * tiles), pieces, 64)) * columns
        splits = cdiv(classes, span)
    return Rows(outer, inner, classes, tiles, rows, columns, splits, span), list(steps)
