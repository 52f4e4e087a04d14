"""aggregate: plain PyTorch references of the weighted means and of the exact accumulator.

Normal numbers are counter-based: Philox4x32-10 and the Box-Muller transform. Philox: Salmon, Moraes, Dror, Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011. Box and Muller, "A note on the generation of random normal
deviates", Annals of Mathematical Statistics 29, 1958.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedkern.ops._aggregate.checks import near_one
from fedkern.ops._core.memory import PIECE

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def to_signed(word: int) -> int:
    """Reinterpret 64 bits as a signed integer, as torch.library requires."""
    return word - (1 << 64) if word >= 1 << 63 else word


def philox(counter: Tensor, seed: int, high: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four uniform 32-bit words (int64) for every 64-bit counter (int64, its bits taken as unsigned).

    ``seed``: the 64 key bits; ``high``: the upper 64 counter bits.
    """
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2, c3 = torch.full_like(c0, high & _LOW), torch.full_like(c0, high >> 32)
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(10):
        # The int64 product wraps modulo 2^64: its bits, and so both 32-bit halves, are those of the unsigned product.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW)
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


REFINED = 1 << 12
"""Radius words below this bound, a share of 2^-20, get 32 more bits; see :func:`normal`."""


def normal(size: int, seed: int, offset: int, device: torch.device | None = None) -> Tensor:
    """Draw the standard normal numbers ``offset ... offset + size - 1`` (modulo 2^64) of a stream, fp64 ``[size]``.

    Place e takes word ``(e >> 4) & 3`` of counter ``16 * (e >> 6) + (e & 15)``: 64 places are 16 counters, so that a
    vector register holds one word of many counters without a shuffle. Words 0 and 1 make two of a counter's four
    numbers, words 2 and 3 the other two:

        u = (fp32(word 0) + 1/2) / 2^32 in fp32, t = fp32(word 1 as a signed integer) / 2^31,
        sqrt(-2 ln u) cos(pi t) and sqrt(-2 ln u) sin(pi t).

    These reach 6.77 standard deviations. So a radius word (0 or 2) below :data:`REFINED` gets 32 more bits: the same
    word w of the same counter with upper half 1 (elsewhere 0),

        u = (fp32(2^32 * word 0 + w) + 1/2) / 2^64 in fp32.

    The bound is then 9.5 standard deviations, which a normal number exceeds with probability 2^-68.
    """
    begin = offset & ~63
    groups = (offset + size - begin + 63) // 64
    # A counter has 62 bits: it makes four of the 2^64 places.
    start = (begin >> 6) << 4
    counter = (torch.arange(groups * 16, dtype=torch.int64, device=device) + start) & ((1 << 62) - 1)
    words = philox(counter, seed)
    numbers = torch.empty(groups, 4, 16, dtype=torch.float64, device=device)
    for k in (0, 2):

        def refine(rare: Tensor, k: int = k) -> Tensor:
            return philox(counter[rare], seed, 1)[k]

        cosine, sine = _box_muller(uniform(words[k], refine), words[k + 1])
        numbers[:, k], numbers[:, k + 1] = cosine.view(groups, 16), sine.view(groups, 16)
    return numbers.flatten()[offset - begin : offset - begin + size]


def uniform(word: Tensor, refine: Callable[[Tensor], Tensor]) -> Tensor:
    """Convert radius words to uniform numbers in (0, 1], fp32.

    ``refine`` returns the refining words for an index tensor.
    """
    result = (word.to(torch.float32) + 0.5) * 2.0**-32
    rare = (word < REFINED).nonzero()[:, 0]
    if len(rare):
        wide = word[rare] << 32 | refine(rare)
        result[rare] = (wide.to(torch.float32) + 0.5) * 2.0**-64
    return result


def _box_muller(u: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    radius = (-2 * u.double().log()).sqrt()
    signed_word = torch.where(angle_word >= 1 << 31, angle_word - (1 << 32), angle_word)
    angle = (signed_word.to(torch.float32) * 2.0**-31).double() * math.pi
    return radius * angle.cos(), radius * angle.sin()


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
