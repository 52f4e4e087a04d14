"""Numbers in Triton kernels: computing dtype, doubles as arguments, rounding once, sums over programs' parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedkern.ops._core.triton.launch import launch, power_of_two

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
