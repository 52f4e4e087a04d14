"""aggregate: plain PyTorch references of the weighted means and of the exact accumulator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedkern.ops._aggregate.checks import near_one
from fedkern.ops._core.memory import PIECE

# Positions of the digits of an exact sum, and codes of sums that are not finite; the same numbers as in
# csrc/include/fedkern/aggregate.h.
LOWEST, HIGHEST, INFINITE, MINUS_INFINITE, NOT_A_NUMBER = -31, 31, 32, 33, 34


def weighted_mean_reference(
    vectors: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float], dtype: torch.dtype | None = None
) -> Tensor:
    """Specify :func:`fedkern.ops.weighted_mean`: sums in fp64, in the order given."""
    rows = list(vectors)
    values = near_one(torch.as_tensor(weights, dtype=torch.float64, device=rows[0].device))
    total = torch.zeros_like(rows[0], dtype=torch.float64)
    for row, value in zip(rows, values, strict=True):
        total = total + torch.where(countable(row, value), row, 0).double() * value
    # A running sum, since sum() adds pairwise.
    return (total / values.cumsum(0)[-1]).to(dtype or rows[0].dtype)


def countable(vectors: Tensor, weights: Tensor) -> Tensor:
    """Return the mask ``[...]`` of the ``vectors [..., P]`` that can be multiplied by ``weights [...]``.

    Only a non-finite vector of weight 0 is masked out: a finite one gives its weight a derivative.
    """
    return (weights != 0) | vectors.isfinite().all(-1)


def pieces(size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + PIECE, size)) for begin in range(0, size, PIECE))


def add_reference(total: Tensor, vector: Tensor, weight: float) -> None:
    for piece in pieces(len(total)):
        total[piece].add_(vector[piece].to(torch.float64, copy=True).mul_(weight))


def mean_in_pieces(vectors: Tensor | Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype | None) -> Tensor:
    """Compute :func:`weighted_mean_reference` without large temporaries and a graph."""
    *_, weight_sum = itertools.accumulate(weights)
    result = torch.empty_like(vectors[0], dtype=dtype)
    for piece in pieces(len(result)):
        total = torch.zeros_like(result[piece], dtype=torch.float64)
        for vector, weight in zip(vectors, weights, strict=True):
            if weight:
                add_reference(total, vector[piece], weight)
        result[piece] = total / weight_sum
    return result


def exact_add_reference(digits: Tensor, top: Tensor, vector: Tensor, weight: float) -> None:
    for piece in pieces(len(top)):
        _exact_add(digits[:, piece], top[piece], vector[piece].double() * weight)


def _exact_add(digits: Tensor, top: Tensor, product: Tensor) -> None:
    exponent = (product.view(torch.int64) >> 52) & 0x7FF
    digit = (((exponent + 1) >> 5) - 32).clamp(min=LOWEST)
    before = top.to(torch.int64)
    special = torch.where(product.isnan(), NOT_A_NUMBER, torch.where(product > 0, INFINITE, MINUS_INFINITE))
    merged = torch.where((before < INFINITE) | (before == special), special, NOT_A_NUMBER)
    after = torch.where(
        digit == INFINITE, merged, torch.where(before >= INFINITE, before, torch.maximum(before, digit))
    )
    finite = after < INFINITE
    digits.copy_(raise_digits(digits, torch.where(finite, after - before, 0)))
    top.copy_(after)
    product = torch.where(finite, product, 0.0)
    remainder = product * _power_of_two(-32 * after.clamp(max=HIGHEST))
    digits *= finite
    for row in digits:
        integer = remainder.trunc()
        row += integer.to(torch.int64)
        remainder = (remainder - integer) * 2.0**32


def raise_digits(digits: Tensor, rise: Tensor) -> Tensor:
    """Raise the digits ``int64 [3, P]`` by ``rise [P]`` positions."""
    high, middle, low = digits
    zero = torch.zeros_like(high)
    return torch.stack(
        (
            torch.where(rise == 0, high, zero),
            torch.where(rise == 0, middle, torch.where(rise == 1, high, zero)),
            torch.where(rise == 0, low, torch.where(rise == 1, middle, torch.where(rise == 2, high, zero))),
        )
    )


def exact_merge_reference(digits: Tensor, top: Tensor, more_digits: Tensor, more_top: Tensor) -> None:
    for piece in pieces(len(top)):
        before, theirs = top[piece].to(torch.int64), more_top[piece].to(torch.int64)
        after = torch.maximum(before, theirs)
        finite = after < INFINITE
        opposed = (torch.minimum(before, theirs) >= INFINITE) & (before != theirs)
        ours, added = (
            raise_digits(sums[:, piece], torch.where(finite, after - position, 0))
            for sums, position in ((digits, before), (more_digits, theirs))
        )
        digits[:, piece] = (ours + added) * finite
        top[piece] = torch.where(opposed, NOT_A_NUMBER, after).to(torch.int8)


def exact_mean_reference(digits: Tensor, top: Tensor, total: float, out: Tensor) -> None:
    for piece in pieces(len(top)):
        out[piece] = _exact_mean(digits[:, piece], top[piece].to(torch.int64), total)


def _exact_mean(digits: Tensor, top: Tensor, total: float) -> Tensor:
    high, middle, low = digits
    sign = torch.where(high + ((middle + (low >> 32)) >> 32) < 0, -1, 1)
    high, middle, low = sign * high, sign * middle, sign * low
    carried = middle + (low >> 32)
    fraction = (carried & 0xFFFFFFFF).double() * 2.0**-32 + (low & 0xFFFFFFFF).double() * 2.0**-64
    half = _power_of_two(16 * top.clamp(max=HIGHEST))
    value = sign * ((high + (carried >> 32)).double() + fraction) * half / total * half
    value = torch.where(top == INFINITE, math.inf, value)
    value = torch.where(top == MINUS_INFINITE, -math.inf, value)
    return torch.where(top == NOT_A_NUMBER, math.nan, value)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 1023) << 52).view(torch.float64)
