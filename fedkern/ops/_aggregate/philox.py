"""Counter-based normal numbers: Philox4x32-10 and the Box-Muller transform, in plain PyTorch.

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Box and Muller, "A note on
the generation of random normal deviates", Annals of Mathematical Statistics 29, 1958.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

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
