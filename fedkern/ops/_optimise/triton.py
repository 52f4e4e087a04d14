"""optimise in Triton: a program for every block of every row; torch sums over a row's programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedkern.ops._core.memory import placed
from fedkern.ops._core.triton.launch import cdiv, double_bits, launch
from fedkern.ops._core.triton.numbers import COMPUTE, double_of, narrow
from fedkern.ops._optimise.kernels import AdamW, Call

# Elements that a program holds of each vector.
BLOCK = 1024


class TritonOptimise:
    """The method of :class:`fedkern.ops._optimise.kernels.OptimiseKernels` in Triton."""

    def step(self, call: Call) -> tuple[Tensor, Tensor]:
        parameters = call.parameters
        (rows, size), device = parameters.shape, parameters.device
        chunks = cdiv(size, BLOCK)
        programs = rows * chunks
        terms = (
            parameters, call.gradients, call.anchor, call.correction, size, chunks, *map(_step, (
                parameters, call.gradients, call.anchor, call.correction,
            )), double_bits(call.proximal),
        )  # fmt: skip
        meta = {
            "ANCHOR": call.proximal != 0, "CORRECTION": call.correction is not None,
            "COMPUTE": COMPUTE[parameters.dtype], "BLOCK": BLOCK,
        }  # fmt: skip
        squares = torch.empty(rows, chunks, dtype=torch.float64, device=device)
        finite = torch.empty(rows, chunks, dtype=torch.bool, device=device)
        scales = None
        if call.max_norm is not None:
            launch(squares_kernel, programs, device, *terms, squares, **meta)
            norm = squares.sum(1).sqrt()
            scales = torch.where(norm <= call.max_norm, 1.0, call.max_norm / norm)  # NaN where the norm is
        lr, each = call.lr, None
        if not isinstance(lr, float):
            each = lr.contiguous() if isinstance(lr, Tensor) else placed(lr, device)
            lr = 0.0
        numbers = call.adamw or AdamW(0.0, 0.0, 1.0, 1.0, 0.0)
        states = (call.first, call.second, call.gradient_sum)
        launch(
            step_kernel, programs, device, *terms, *states, *map(_step, states), each, scales, squares, finite,
            double_bits(lr), double_bits(call.momentum), double_bits(call.weight_decay), *map(double_bits, numbers),
            ADAMW=call.adamw is not None, MOMENTUM=call.first is not None, DECAY=call.weight_decay != 0,
            SUM=call.gradient_sum is not None, EACH=each is not None, CLIP=scales is not None, ZERO=call.zero, **meta,
        )  # fmt: skip
        squared = squares.sum(1)
        return finite.all(1) & squared.isfinite(), squared


def _step(tensor: Tensor | None) -> int:
    """Elements from row to row.

    0 if there is no tensor.
    """
    return 0 if tensor is None else tensor.stride(0)


@triton.jit
def _gradient(
    parameters, gradients, anchor, correction, row, place, mask, parameters_step, gradients_step, anchor_step,
    correction_step, proximal, ANCHOR: tl.constexpr, CORRECTION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The raw gradient, the gradient with the method's terms (correction, proximal), and the parameters."""
    theta = tl.load(parameters + row * parameters_step + place, mask=mask, other=0).to(COMPUTE)
    raw = tl.load(gradients + row * gradients_step + place, mask=mask, other=0).to(COMPUTE)
    g = raw
    if CORRECTION:
        g += tl.load(correction + row * correction_step + place, mask=mask, other=0).to(COMPUTE)
    if ANCHOR:
        start = tl.load(anchor + row * anchor_step + place, mask=mask, other=0).to(COMPUTE)
        g = tl.fma(theta - start, tl.zeros_like(g) + double_of(proximal, COMPUTE), g)
    return raw, g, theta


@triton.jit
def _squares(g):
    wide = g.to(tl.float64)
    return tl.sum(wide * wide, axis=0)


@triton.jit(do_not_specialize=["proximal"])
def squares_kernel(
    parameters, gradients, anchor, correction, size, chunks, parameters_step, gradients_step, anchor_step,
    correction_step, proximal, squares,
    ANCHOR: tl.constexpr, CORRECTION: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of squares of a block of a row's gradient, with the method's terms."""
    program = tl.program_id(0).to(tl.int64)
    row, place = program // chunks, (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    _, g, _ = _gradient(
        parameters, gradients, anchor, correction, row, place, place < size, parameters_step, gradients_step,
        anchor_step, correction_step, proximal, ANCHOR, CORRECTION, COMPUTE,
    )  # fmt: skip
    tl.store(squares + program, _squares(g))


@triton.jit
def _put(value, to, place, mask):
    """Stores ``value``; returns 1 for every element that is not finite after rounding."""
    rounded = narrow(value, to)
    tl.store(to + place, rounded, mask=mask)
    wide = rounded.to(tl.float64) if rounded.dtype == tl.float64 else rounded.to(tl.float32)
    return tl.where(mask & (wide - wide != 0), 1, 0)


@triton.jit(do_not_specialize=[
    "proximal", "lr", "momentum", "weight_decay", "beta1", "beta2", "bias", "root", "eps",
])  # fmt: skip
def step_kernel(
    parameters, gradients, anchor, correction, size, chunks, parameters_step, gradients_step, anchor_step,
    correction_step, proximal, first, second, gradient_sum, first_step, second_step, sum_step, lr_each, scales,
    squares, finite, lr, momentum, weight_decay, beta1, beta2, bias, root, eps,
    ADAMW: tl.constexpr, MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SUM: tl.constexpr, EACH: tl.constexpr,
    CLIP: tl.constexpr, ZERO: tl.constexpr,
    ANCHOR: tl.constexpr, CORRECTION: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row's step.

    Also writes the gradient's sum of squares and whether all written values are finite.
    """
    program = tl.program_id(0).to(tl.int64)
    row, place = program // chunks, (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    raw, g, theta = _gradient(
        parameters, gradients, anchor, correction, row, place, mask, parameters_step, gradients_step, anchor_step,
        correction_step, proximal, ANCHOR, CORRECTION, COMPUTE,
    )  # fmt: skip
    nothing = tl.zeros_like(g)
    odd = tl.zeros([BLOCK], tl.int32)
    if SUM:
        total = tl.load(gradient_sum + row * sum_step + place, mask=mask, other=0).to(COMPUTE) + raw
        odd += _put(total, gradient_sum + row * sum_step, place, mask)
    if ZERO:
        tl.store(gradients + row * gradients_step + place, narrow(nothing, gradients), mask=mask)
    tl.store(squares + program, _squares(g))
    if CLIP:
        g *= tl.load(scales + row).to(COMPUTE)
    rate = tl.load(lr_each + row) if EACH else double_of(lr, tl.float64)
    decay = double_of(weight_decay, tl.float64)
    if ADAMW:
        way = (1.0 - double_of(beta1, tl.float64)).to(COMPUTE)
        rest = (1.0 - double_of(beta2, tl.float64)).to(COMPUTE)
        one = tl.load(first + row * first_step + place, mask=mask, other=0).to(COMPUTE)
        two = tl.load(second + row * second_step + place, mask=mask, other=0).to(COMPUTE)
        one = tl.where(
            nothing + way < 0.5, tl.fma(nothing + way, g - one, one), tl.fma(nothing + (way - 1), g - one, g)
        )
        two = tl.fma(rest * g, g, two * double_of(beta2, COMPUTE))
        odd += _put(one, first + row * first_step, place, mask)
        odd += _put(two, second + row * second_step, place, mask)
        below = tl.sqrt(two) / double_of(root, COMPUTE) + double_of(eps, COMPUTE)
        along = (-rate / double_of(bias, tl.float64)).to(COMPUTE) * one
        theta = along / below + theta * (1.0 - rate * decay).to(COMPUTE)
    else:
        if DECAY:
            g = tl.fma(theta, nothing + decay.to(COMPUTE), g)
        if MOMENTUM:
            g += tl.load(first + row * first_step + place, mask=mask, other=0).to(COMPUTE) * double_of(
                momentum, COMPUTE
            )
            odd += _put(g, first + row * first_step, place, mask)
        theta = tl.fma(g, nothing + (-rate).to(COMPUTE), theta)
    odd += _put(theta, parameters + row * parameters_step, place, mask)
    tl.store(finite + program, tl.sum(odd, axis=0) == 0)
