"""The means in Triton: weighted mean and running mean. Their launcher is in aggregate.py.

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
