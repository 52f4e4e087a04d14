"""More aggregation kernels in Triton: means by rank, squared distances, scaled vectors with noise.

Vectors come as one pointer, with each vector's distance from it in elements (encoded kernel parameters) or a stride.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedkern.ops._aggregate.triton.means import _wide, difference, weights_of
from fedkern.ops._core.triton.numbers import double_of, narrow
from fedkern.ops._core.triton.offsets import pick, starts_of


@triton.jit
def _before(x, y, x_first):
    """Whether x comes before y in ascending order, NaN last; ``x_first`` decides between equal values."""
    x_nan, y_nan = x != x, y != y
    same = (x == y) | (x_nan & y_nan)
    return (x < y) | (y_nan & ~x_nan) | (same & x_first)


@triton.jit(do_not_specialize=["offsets", "weights", "low", "high"])
def rank_kernel(
    vectors, offsets, weights, out, count, size, row_stride, stride, low, high,
    MEDIAN: tl.constexpr, WEIGHTED: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """For every coordinate the mean of the values of rank ``low`` to ``high - 1``, or (MEDIAN) the weighted median.

    A value's rank is the number of values before it.  Counting moves no values, so that each stays with its weight.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    member = tl.arange(0, MEMBERS)
    start = starts_of(offsets, row_stride, member, COUNT)
    mask = (member < count)[:, None] & (place < size)[None, :]
    x = tl.load(vectors + start[:, None] + (place * stride)[None, :], mask=mask, other=0)
    x = x if x.dtype == tl.float64 else x.to(tl.float32)
    rank = tl.zeros([MEMBERS, BLOCK], tl.int32)
    if WEIGHTED:
        share = weights_of(weights, member, count, BITS)
    if MEDIAN:
        below = tl.zeros([MEMBERS, BLOCK], tl.float64)  # the weight up to and including each value
        whole = tl.zeros([1], tl.float64)
    for k in range(count):
        begin = pick(start, member, k)
        y = tl.load(vectors + begin + place * stride, mask=place < size, other=0)
        y = y if y.dtype == tl.float64 else y.to(tl.float32)
        earlier = _before(y[None, :], x, (k < member)[:, None])
        rank += earlier.to(tl.int32)
        if MEDIAN:
            weight = pick(share, member, k)
            whole += weight
            below += tl.where(earlier | (member == k)[:, None], weight, 0.0)
    real = (member < count)[:, None]
    if MEDIAN:
        half = whole / 2
        last = count - 1
        lower = tl.sum((real & (below < half * (1 - EDGE))).to(tl.int32), axis=0)
        upper = tl.sum((real & (below <= half * (1 + EDGE))).to(tl.int32), axis=0)
        lower, upper = tl.minimum(lower, last), tl.minimum(upper, last)
        one = tl.sum(tl.where(real & (rank == lower[None, :]), x, 0.0).to(tl.float64), axis=0)
        two = tl.sum(tl.where(real & (rank == upper[None, :]), x, 0.0).to(tl.float64), axis=0)
        result = tl.where(half > 0, (one + two) / 2, float("nan"))
    else:
        kept = real & (rank >= low) & (rank < high)
        if WEIGHTED:
            by_row = share[:, None]
            kept = kept & (by_row != 0)
            mean = tl.sum(by_row * tl.where(kept, x, 0.0).to(tl.float64), axis=0)
            result = mean / tl.sum(tl.where(kept, by_row, 0.0), axis=0)
        else:
            result = tl.sum(tl.where(kept, x, 0.0).to(tl.float64), axis=0) / (high - low)
    tl.store(out + place, narrow(result, out), mask=place < size)


@triton.jit(do_not_specialize=["offsets"])
def pairs_kernel(
    vectors, offsets, partial, count, size, row_stride, stride, span,
    COUNT: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Squared distances of all pairs over ``span`` coordinates, ``partial [programs, MEMBERS, MEMBERS]``."""
    program = tl.program_id(0).to(tl.int64)
    member = tl.arange(0, MEMBERS)
    start = starts_of(offsets, row_stride, member, COUNT)
    total = tl.zeros([MEMBERS, MEMBERS], tl.float64)
    for begin in range(program * span, tl.minimum((program + 1) * span, size), BLOCK):
        place = begin + tl.arange(0, BLOCK)
        mask = (member < count)[:, None] & (place < size)[None, :]
        x = _wide(tl.load(vectors + start[:, None] + (place * stride)[None, :], mask=mask, other=0))
        for k in range(count):
            first = pick(start, member, k)
            y = _wide(tl.load(vectors + first + place * stride, mask=place < size, other=0))
            # Only one side of the diagonal; the launcher mirrors it, bit for bit.
            d = tl.where((member < k)[:, None] & mask, difference(x, y[None, :]), 0.0)
            total += tl.where((member == k)[None, :], tl.sum(d * d, axis=1)[:, None], 0.0)
    place = program * MEMBERS * MEMBERS + (member * MEMBERS)[:, None] + member[None, :]
    tl.store(partial + place, total)


@triton.jit(do_not_specialize=["offsets"])
def distances_kernel(
    vectors, offsets, point, partial, count, size, row_stride, stride, span,
    COUNT: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Squared distances to ``point`` (None: 0) over ``span`` coordinates, ``partial [programs, count]``."""
    program = tl.program_id(0).to(tl.int64)
    member = tl.arange(0, MEMBERS)
    start = starts_of(offsets, row_stride, member, COUNT)
    total = tl.zeros([MEMBERS, BLOCK], tl.float64)
    for begin in range(program * span, tl.minimum((program + 1) * span, size), BLOCK):
        place = begin + tl.arange(0, BLOCK)
        mask = (member < count)[:, None] & (place < size)[None, :]
        x = _wide(tl.load(vectors + start[:, None] + (place * stride)[None, :], mask=mask, other=0))
        if point is not None:
            there = tl.load(point + place, mask=place < size, other=0)[None, :]
            x = tl.where(mask, difference(x, there), 0.0)
        total += x * x
    tl.store(partial + program * count + member, tl.sum(total, axis=1), mask=member < count)


@triton.jit
def _uniform(word):
    """A number in (0, 1] from a random word."""
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _refined(uniform, word, more):
    """``uniform``, made of 32 more bits if the word is in the lowest 2^-20 of its range."""
    wide = (word.to(tl.int64) << 32) | more.to(tl.int64)
    return tl.where(word < 4096, (wide.to(tl.float32) + 0.5) * 5.421010862427522e-20, uniform)


@triton.jit
def _normal_pair(uniform, two):
    """The Box-Muller transform of a uniform number and a random word."""
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    angle = (two.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10) * 3.141592653589793
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit(do_not_specialize=["offsets", "deviation", "seed", "offset"])
def noise_kernel(
    vectors, offsets, factors, out, size, row_stride, stride, tiles, deviation, seed, offset,
    NOISE: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``factors[m] * x + deviation * normal``; :mod:`fedkern.ops._aggregate.philox` numbers the random numbers."""
    program = tl.program_id(0)
    m = (program // tiles).to(tl.int64)
    group = (program % tiles).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, 16).to(tl.int64)
    begin = starts_of(offsets, row_stride, m, COUNT)
    factor = tl.load(factors + m)
    start = offset.to(tl.int64) + m * size  # modulo 2^64, as the stream's places are
    skipped = start & 63
    if NOISE:
        # 64 places are 16 counters of four words.  Places have 64 bits, so counters have 62.
        first = ((start >> 6) & 0x3FFFFFFFFFFFFFF) << 4
        counter = (first + group * 16)[:, None] + lane[None, :]
        counter = counter & 0x3FFFFFFFFFFFFFFF
        low = (counter & 0xFFFFFFFF).to(tl.uint32)
        high = (counter >> 32).to(tl.uint32)
        zero = tl.zeros_like(low)
        w0, w1, w2, w3 = tl.philox(seed.to(tl.int64), low, high, zero, zero)
        u0, u2 = _uniform(w0), _uniform(w2)
        if tl.min(tl.minimum(w0, w2).to(tl.int64)) < 4096:
            r0, _r1, r2, _r3 = tl.philox(seed.to(tl.int64), low, high, tl.full(low.shape, 1, tl.uint32), zero)
            u0, u2 = _refined(u0, w0, r0), _refined(u2, w2, r2)
        n0, n1 = _normal_pair(u0, w1)
        n2, n3 = _normal_pair(u2, w3)
    for word in tl.static_range(4):
        place = (group * 64 + 16 * word - skipped)[:, None] + lane[None, :]
        mask = (place >= 0) & (place < size)
        value = _wide(tl.load(vectors + begin + place * stride, mask=mask, other=0)) * factor
        if NOISE:
            noise = n0 if word == 0 else n1 if word == 1 else n2 if word == 2 else n3
            value += double_of(deviation, tl.float64) * noise.to(tl.float64)
        tl.store(out + m * size + place, narrow(value, out), mask=mask)
