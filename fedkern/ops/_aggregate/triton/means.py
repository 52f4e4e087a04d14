"""The means in Triton: weighted mean, running mean and server_step; their launcher is in aggregate.py.

Vectors come as a tuple of pointers, or as one pointer with the offsets of _core/triton/offsets.py or a stack's stride.
Weights come as :func:`encoded` doubles or in memory.  Pointers, offsets and encoded weights are kernel parameters:
nothing is copied to the device.  Sums are taken in fp64, over the vectors in ascending order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedkern.ops._core.triton.launch import double_bits
from fedkern.ops._core.triton.numbers import double_of, narrow
from fedkern.ops._core.triton.offsets import MARK, pick, starts_of


@triton.jit
def _wide(x):
    """A load as fp64.

    16-bit types by way of fp32.
    """
    return x if x.dtype == tl.float64 else x.to(tl.float32).to(tl.float64)


@triton.jit
def difference(a, b):
    """``a - b``, and 0 between equal infinities."""
    return tl.where(a == b, 0.0, a - b)


def encoded(weight: float) -> int:
    """Code of a double that is not negative: its bits moved up by one, in a number that Triton does not specialise.

    The exception are weights near 1.1e-308, see :data:`fedkern.ops._core.triton.offsets.MARK`.
    """
    code = (double_bits(abs(weight)) << 1 | 1) ^ MARK.value
    return code - (1 << 64) if code >> 63 else code


@triton.jit
def weights_of(weights, member, count, BITS: tl.constexpr):
    """The weights of ``member [MEMBERS]``, 0 past the last, from kernel parameters or from memory."""
    if BITS > 0:
        code = tl.zeros_like(member).to(tl.int64) + (MARK + 1)
        for k in tl.static_range(BITS):
            code = tl.where(member == k, tl.cast(weights[k], tl.int64), code)
        share = (((code ^ MARK) >> 1) & 0x7FFFFFFFFFFFFFFF).to(tl.float64, bitcast=True)
    else:
        share = tl.load(weights + member, mask=member < count, other=0).to(tl.float64)
    return share


@triton.jit(do_not_specialize=["offsets", "weights"])
def mean_kernel(
    vectors, offsets, weights, total, sums, out, count, size, row_stride, stride,
    UNROLLED: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, MEMBERS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``sum w x / sum w``; between several launches, ``total`` and ``sums`` carry the sums over.

    If UNROLLED is not 0, ``vectors`` are that many pointers; else one pointer, from which the others are found by
    ``offsets`` or ``row_stride``.  A vector of weight zero is not read.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    sum_ = tl.zeros([BLOCK], tl.float64)
    weight_sum = tl.zeros([1], tl.float64)
    if not FIRST:
        sum_ += tl.load(total + place, mask=mask, other=0)
        weight_sum += tl.load(sums + tl.program_id(0))
    member = tl.arange(0, MEMBERS)
    share = weights_of(weights, member, count, BITS)
    if UNROLLED > 0:
        for m in tl.static_range(UNROLLED):
            weight = pick(share, member, m)
            x = tl.load(vectors[m] + place * stride, mask=mask & (weight != 0), other=0)
            sum_ += weight * _wide(x)
            weight_sum += weight
    else:
        start = starts_of(offsets, row_stride, member, COUNT)
        for m in range(count):
            weight, begin = pick(share, member, m), pick(start, member, m)
            x = tl.load(vectors + begin + place * stride, mask=mask & (weight != 0), other=0)
            sum_ += weight * _wide(x)
            weight_sum += weight
    if LAST:
        tl.store(out + place, narrow(sum_ / weight_sum, out), mask=mask)
    else:
        tl.store(total + place, sum_, mask=mask)
        tl.store(sums + tl.program_id(0) + tl.arange(0, 1), weight_sum)


@triton.jit(do_not_specialize=["weight"])
def add_kernel(total, vector, weight, size, stride, BLOCK: tl.constexpr):
    """``total += weight * vector``, product and sum each rounded."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    x = _wide(tl.load(vector + place * stride, mask=mask, other=0))
    tl.store(total + place, tl.load(total + place, mask=mask, other=0) + x * double_of(weight, tl.float64), mask=mask)


@triton.jit(do_not_specialize=["weight"])
def divide_kernel(total, weight, out, size, BLOCK: tl.constexpr):
    """``total / weight``."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    tl.store(
        out + place, narrow(tl.load(total + place, mask=mask, other=0) / double_of(weight, tl.float64), out), mask=mask
    )


@triton.jit(do_not_specialize=["offsets", "weights", "rate", "beta1", "beta2", "tau"])
def step_kernel(
    old, vectors, offsets, weights, first, second, out, partial, count, size, old_stride, row_stride, stride,
    rate, beta1, beta2, tau,
    RULE: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, MEMBERS: tl.constexpr, SIMILAR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of the server's step: mean delta, the optimiser's update, and the block's part of norms and products.

    ``partial [programs, 2 * count + 1]``: squares of the deltas, their products with the mean, the mean's square; only
    if SIMILAR.  Deltas are then read twice, the second time from the cache.
    """
    program = tl.program_id(0).to(tl.int64)
    place = program * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    before = _wide(tl.load(old + place * old_stride, mask=mask, other=0))
    mean = tl.zeros([BLOCK], tl.float64)
    weight_sum = tl.zeros([1], tl.float64)
    member = tl.arange(0, MEMBERS)
    share = weights_of(weights, member, count, BITS)
    start = starts_of(offsets, row_stride, member, COUNT)
    for m in range(count):
        weight, begin = pick(share, member, m), pick(start, member, m)
        x = tl.load(vectors + begin + place * stride, mask=mask, other=0)
        mean += tl.where(weight == 0, 0.0, weight * difference(_wide(x), before))
        weight_sum += weight
    mean = tl.where(mask, mean / weight_sum, 0.0)
    if SIMILAR:
        partial += program * (2 * count + 1)
        tl.store(partial + 2 * count, tl.sum(mean * mean, axis=0))
        for m in range(count):
            x = tl.load(vectors + pick(start, member, m) + place * stride, mask=mask, other=0)
            delta = difference(_wide(x), before)
            tl.store(partial + m, tl.sum(delta * delta, axis=0))
            tl.store(partial + count + m, tl.sum(delta * mean, axis=0))

    learning = double_of(rate, tl.float64)
    if RULE == 0:
        update = learning * mean
    elif RULE == 1:
        momentum = double_of(beta1, tl.float64) * _wide(tl.load(first + place, mask=mask, other=0)) + mean
        tl.store(first + place, narrow(momentum, first), mask=mask)
        update = learning * momentum
    else:
        b1, b2 = double_of(beta1, tl.float64), double_of(beta2, tl.float64)
        blended = b1 * _wide(tl.load(first + place, mask=mask, other=0)) + (1.0 - b1) * mean
        two = _wide(tl.load(second + place, mask=mask, other=0))
        square = mean * mean
        if RULE == 2:
            two = b2 * two + (1.0 - b2) * square
        elif RULE == 3:
            sign = tl.where(two > square, 1.0, tl.where(two < square, -1.0, two - square))
            two = two - (1.0 - b2) * square * sign
        else:
            two = two + square
        tl.store(first + place, narrow(blended, first), mask=mask)
        tl.store(second + place, narrow(two, second), mask=mask)
        update = learning * blended / (tl.sqrt(two) + double_of(tau, tl.float64))
    tl.store(out + place, narrow(before + update, out), mask=mask)
