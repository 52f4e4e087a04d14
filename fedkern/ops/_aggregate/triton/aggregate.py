"""The aggregate family in Triton: from vectors to launches. The kernels are in means.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedkern.ops._aggregate.checks import Vectors, Weights, deliver, direct_target, rows_of
from fedkern.ops._aggregate.plain import PlainAggregate
from fedkern.ops._aggregate.triton.means import add_kernel, divide_kernel, encoded, mean_kernel
from fedkern.ops._core.triton.launch import cdiv, double_bits, filled, launch, power_of_two
from fedkern.ops._core.triton.offsets import tensor_starts

# Elements that a program holds of each vector.
BLOCK = 1024
# Most vectors that unrolled code reads at once.
UNROLLED = 16
# Most vectors whose mean a launch takes; more take several launches.
MEMBERS = 64


class TritonAggregate(PlainAggregate):
    """Means and accumulators in Triton. All else is PlainAggregate's, and ``backend.serve`` names it."""

    def weighted_mean(self, vectors: Vectors, weights: Weights, out: Tensor | None) -> Tensor:
        rows, size, device = rows_of(vectors), vectors[0].shape[0], vectors[0].device
        dtype = vectors[0].dtype
        target = direct_target(out, vectors)
        if target is None:
            target = torch.empty(size, dtype=dtype if out is None else out.dtype, device=device)
        programs = cdiv(size, BLOCK)
        several = len(rows) > MEMBERS
        total = torch.empty(size if several else 0, dtype=torch.float64, device=device)
        sums = torch.empty(programs if several else 0, dtype=torch.float64, device=device)
        for begin in range(0, len(rows), MEMBERS):
            end = min(begin + MEMBERS, len(rows))
            shares, unrolled = _parameters(weights[begin:end]), 0
            base: object
            offsets: tuple[int, ...] = ()
            copies: object = None
            if end - begin <= UNROLLED:
                some, stride = _same_stride(rows[begin:end])
                base, row_stride, unrolled = filled(some, some[0]), 0, power_of_two(len(some))
            else:
                base, offsets, (row_stride, stride), copies = Table.of(vectors[begin:end])
            launch(
                mean_kernel, programs, device, base, offsets, shares, total, sums, target, end - begin, size,
                row_stride, stride, UNROLLED=unrolled, BITS=_bits(shares), COUNT=len(offsets),
                MEMBERS=power_of_two(end - begin), FIRST=begin == 0, LAST=end == len(rows), BLOCK=BLOCK,
            )  # fmt: skip
            del copies
        return target if out is None else deliver(target, out)

    def accumulate(self, total: Tensor, vector: Tensor, weight: float) -> None:
        launch(
            add_kernel, cdiv(len(total), BLOCK), total.device, total, vector, double_bits(weight), len(total),
            vector.stride(0), BLOCK=BLOCK,
        )  # fmt: skip

    def accumulated_mean(self, total: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        size = len(total)
        target = out if isinstance(out, Tensor) else torch.empty(size, dtype=out, device=total.device)
        launch(divide_kernel, cdiv(size, BLOCK), total.device, total, double_bits(weight), target, size, BLOCK=BLOCK)
        return target


def _same_stride(rows: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """The vectors and their one stride.

    Copies if their strides differ.
    """
    strides = {row.stride(0) for row in rows}
    if len(strides) == 1:
        return list(rows), strides.pop()
    return [row.contiguous() for row in rows], 1


def _parameters(weights: Weights) -> Tensor | tuple[int, ...]:
    """Weights as kernel parameters: the tensor on the device, or :func:`encoded` numbers, padded by :func:`filled`."""
    if isinstance(weights, Tensor):
        return weights.resolve_neg().contiguous()  # kernels read weights at stride 1
    return filled(map(encoded, weights), encoded(0.0))


def _bits(shares: Tensor | tuple[int, ...]) -> int:
    return 0 if isinstance(shares, Tensor) else len(shares)


class Table(NamedTuple):
    """Vectors as kernel parameters: the first, the others' distances from it in elements (encoded), and the strides."""

    base: Tensor
    offsets: tuple[int, ...]
    strides: tuple[int, int]
    kept: object
    """Tensors that must stay alive until the launch."""

    @classmethod
    def of(cls, vectors: Vectors) -> Table:
        if isinstance(vectors, Tensor):
            return cls(vectors, (), (vectors.stride(0), vectors.stride(1)), None)
        rows, stride = _same_stride(vectors)
        return cls(rows[0], tensor_starts(rows), (0, stride), rows)
