"""contrastive in Triton: the kernels on tiles of similarities, over which tiled.py loops."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedkern.ops._contrast.tiled import Pairs, TiledContrast
from fedkern.ops._core.triton.launch import cdiv, double_bits, launch
from fedkern.ops._core.triton.numbers import COMPUTE, double_of, finish, join

# Rows and columns of a block; with eight warps each thread holds 16 elements of fp32.
BLOCK = {torch.float32: 64, torch.float64: 32}
LINES = 128


@triton.jit
def scale_of(learnt, temperature, COMPUTE: tl.constexpr):
    if learnt is not None:
        return 1.0 / tl.load(learnt).to(COMPUTE)
    return 1.0 / double_of(temperature, COMPUTE)


@triton.jit
def place_of(across, rows, count, stride, BLOCK: tl.constexpr):
    """Return this program's block: place down and along, rows, columns, offsets, and mask."""
    program = tl.program_id(0)
    row = program // across * BLOCK + tl.arange(0, BLOCK)
    column = program % across * BLOCK + tl.arange(0, BLOCK)
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    return program // across, program % across, row, column, offset, (row < rows)[:, None] & (column < count)[None, :]


@triton.jit
def base_of(top):
    """Return the number to subtract before exp: 0 for a line of only -inf, which then adds nothing."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit(do_not_specialize=["temperature", "begin"])
def look_kernel(
    tile, tops, totals, partners, learnt, temperature, rows, count, begin, stride, across,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write maxima and sums of exponentials of a block's rows and columns, and partners' similarities."""
    scale = scale_of(learnt, temperature, COMPUTE)
    down, along, row, column, offset, mask = place_of(across, rows, count, stride, BLOCK)
    s = tl.where(mask, tl.load(tile + offset, mask=mask, other=0), float("-inf"))
    top = tl.max(s, axis=1)
    total = tl.sum(tl.exp((s - base_of(top)[:, None]) * scale), axis=1)
    place = along.to(tl.int64) * 2 * count + begin + row
    tl.store(tops + place, top, mask=row < rows)
    tl.store(totals + place, total, mask=row < rows)
    top = tl.max(s, axis=0)
    total = tl.sum(tl.exp((s - base_of(top)[None, :]) * scale), axis=0)
    place = (begin // BLOCK + down).to(tl.int64) * 2 * count + count + column
    tl.store(tops + place, top, mask=column < count)
    tl.store(totals + place, total, mask=column < count)
    partner = (begin + row)[:, None] == column[None, :]
    mine = tl.sum(tl.where(partner & mask, s, 0.0), axis=1)
    tl.store(partners + begin + row, mine, mask=(row < rows) & ((begin + row) // BLOCK == along))


@triton.jit(do_not_specialize=["temperature"])
def join_kernel(
    tops, totals, partners, sums, losses, learnt, temperature, count, blocks,
    COMPUTE: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Join the pieces of each line, and write its loss: log-sum-exp minus the partner's similarity."""
    scale = scale_of(learnt, temperature, COMPUTE)
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    mask = line < 2 * count
    top = tl.full([LINES], float("-inf"), COMPUTE)
    total = tl.zeros([LINES], COMPUTE)
    place = line.to(tl.int64)
    for _ in range(0, blocks):
        piece_top = tl.load(tops + place, mask=mask, other=0)
        top, total = join(top, total, piece_top, tl.load(totals + place, mask=mask, other=1), scale)
        place += 2 * count
    place = line + tl.where(line < count, 0, count)
    tl.store(sums + place, top, mask=mask)
    tl.store(sums + place + count, total, mask=mask)
    below = (top - tl.load(partners + line % count, mask=mask, other=0)).to(tl.float64) * scale.to(tl.float64)
    loss = below + tl.log(total).to(tl.float64)
    tl.store(losses + line, tl.where(loss < 0, 0.0, loss), mask=mask)


@triton.jit(do_not_specialize=["temperature", "begin"])
def gradient_kernel(
    tile, sums, learnt, temperature, rows, count, begin, stride, across,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute (softmax of rows + softmax of columns - 2 I) / (temperature count), in place."""
    scale = scale_of(learnt, temperature, COMPUTE)
    _, _, row, column, offset, mask = place_of(across, rows, count, stride, BLOCK)
    s = tl.load(tile + offset, mask=mask, other=0)
    line = begin + row
    base = base_of(tl.load(sums + line, mask=row < rows, other=0))[:, None]
    share = 1.0 / tl.load(sums + count + line, mask=row < rows, other=1)
    softmaxes = tl.exp((s - base) * scale) * share[:, None]
    base = base_of(tl.load(sums + 2 * count + column, mask=column < count, other=0))[None, :]
    share = 1.0 / tl.load(sums + 3 * count + column, mask=column < count, other=1)
    softmaxes += tl.exp((s - base) * scale) * share[None, :]
    softmaxes -= tl.where(line[:, None] == column[None, :], 2.0, 0.0)
    tl.store(tile + offset, softmaxes * (scale / count), mask=mask)


class TritonContrast(TiledContrast):
    """contrastive in Triton."""

    def block(self, dtype: torch.dtype) -> int:
        return BLOCK[dtype]

    def look(self, pairs: Pairs, tile: Tensor, begin: int, pieces: Tensor, partners: Tensor) -> None:
        rows, across = tile.shape[0], pieces.shape[1]
        launch(
            look_kernel, cdiv(rows, self.block(tile.dtype)) * across, tile.device,
            tile, pieces[0], pieces[1], partners, *_temperature(pairs), rows, pairs.size, begin, tile.stride(0), across,
            **_meta(tile, self.block(tile.dtype)),
        )  # fmt: skip

    def join(self, pairs: Pairs, pieces: Tensor, partners: Tensor, sums: Tensor, loss: Tensor) -> None:
        count = pairs.size
        losses = partners.new_empty(2 * count, dtype=torch.float64)
        launch(
            join_kernel, cdiv(2 * count, LINES), partners.device,
            pieces[0], pieces[1], partners, sums, losses, *_temperature(pairs), count, pieces.shape[1],
            COMPUTE=COMPUTE[partners.dtype], LINES=LINES, num_warps=4,
        )  # fmt: skip
        finish(losses, loss, count)

    def gradient(self, pairs: Pairs, tile: Tensor, begin: int, sums: Tensor) -> None:
        rows, block = tile.shape[0], self.block(tile.dtype)
        across = cdiv(pairs.size, block)
        launch(
            gradient_kernel, cdiv(rows, block) * across, tile.device,
            tile, sums, *_temperature(pairs), rows, pairs.size, begin, tile.stride(0), across,
            **_meta(tile, block),
        )  # fmt: skip


def _temperature(pairs: Pairs) -> tuple[Tensor | None, int]:
    value = pairs.temperature
    return (value, 0) if isinstance(value, Tensor) else (None, double_bits(value))


def _meta(tile: Tensor, block: int) -> dict[str, Any]:
    return {"COMPUTE": COMPUTE[tile.dtype], "BLOCK": block, "num_warps": 8}
