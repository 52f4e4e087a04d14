"""Numbers in Triton kernels: computing dtype, doubles as arguments, rounding once, sums over programs' parts.

Several tensors are one parameter: a pointer to the first, and every tensor's distance from it.
"""

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedkern.ops._core.triton.launch import launch, pad_parameters, power_of_two

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


COMPUTE = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), tl.float32) | {torch.float64: tl.float64}


@triton.jit
def double_of(bits, COMPUTE: tl.constexpr):
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)


@triton.jit
def narrow(value, out):
    """Cast ``value`` to ``out``'s dtype by way of fp32: the interpreter cannot cast fp64 to bf16 directly."""
    return value if out.dtype.element_ty == tl.float64 else value.to(tl.float32).to(out.dtype.element_ty)


@triton.jit
def join(top, total, more_top, more_total, scale):
    """Return the joint maximum and sum of exponentials of two parts, where a part of only -inf adds nothing."""
    new = tl.maximum(top, more_top)
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp((top - base) * scale) + more_total * tl.exp((more_top - base) * scale)


@triton.jit(do_not_specialize=["size", "count"])
def sum_kernel(parts, out, size, count, BLOCK: tl.constexpr):
    """Compute ``out = sum(parts) / count``, the same bits every time."""
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, size, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        total += tl.load(parts + place, mask=place < size, other=0)
    tl.store(out, narrow(tl.sum(total, axis=0) / count, out))


def finish(parts: Tensor, out: Tensor, count: int) -> None:
    size = parts.numel()
    launch(sum_kernel, 1, out.device, parts, out, size, count, BLOCK=min(power_of_two(size), 4096))
