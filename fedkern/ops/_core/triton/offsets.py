"""Several tensors as one kernel parameter: a pointer to the first, and every tensor's distance from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from fedkern.ops._core.triton.launch import pad_parameters

# Triton compiles another kernel for a number of a tuple that is 1, divisible by 16, or fits 32 bits. Codes avoid all
# three: they are odd and large, except for whole numbers near 2^51.
MARK = tl.constexpr(1 << 52)


def encode_number(number: int) -> int:
    """Encode a whole number of at most 62 bits and a sign as a number that Triton does not specialise."""
    return (number << 1 | 1) ^ int(MARK.value)


def encode_numbers(numbers: Iterable[int]) -> tuple[int, ...]:
    return pad_parameters(map(encode_number, numbers), encode_number(0))


def tensor_starts(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return each tensor's distance from the first in elements, encoded for :func:`starts_of`."""
    item, base = tensors[0].element_size(), tensors[0].data_ptr()
    return encode_numbers((x.data_ptr() - base) // item for x in tensors)


@triton.jit
def _whole(code):
    return (tl.cast(code, tl.int64) ^ MARK) >> 1


@triton.jit
def starts_of(offsets, member, COUNT: tl.constexpr):
    """Return the starts of ``member``, in elements from the first tensor, from the codes ``offsets``."""
    start = tl.zeros_like(member).to(tl.int64)
    for k in tl.static_range(COUNT):
        start = tl.where(member == k, _whole(offsets[k]), start)
    return start


@triton.jit
def pick(values, member, m):
    """Return element m of a vector in registers, as ``[1]``: the interpreter treats scalar comparisons as numbers."""
    return tl.zeros([1], values.dtype) + tl.sum(tl.where(member == m, values, tl.zeros_like(values)), axis=0)
