"""fuse_concat and fuse_mean in Triton: every map read once and written into its place.

A dense map is ``outer`` runs of ``channels * step`` elements: samples with ``step`` positions per channel if
contiguous, pixels with ``step`` 1 if channels-last.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedkern.ops._core.triton.launch import cdiv, launch, power_of_two, processors
from fedkern.ops._core.triton.numbers import COMPUTE, encode_numbers, pick, starts_of, tensor_starts
from fedkern.ops._fuse.maps import empty_map
from fedkern.ops._fuse.reference import FuseCall, FuseGradients, FuseNeeds

BLOCK = 1024
# Maps that one launch takes as parameters.
MAPS = 64


@triton.jit
def _places(program, inner, total, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Return a block's elements: index in the map, run, place in the run (divided in 32 bits in short runs), mask."""
    begin = program.to(tl.int64) * BLOCK
    run = begin // inner
    place = (begin - run * inner).to(WIDE) + tl.arange(0, BLOCK)
    runs = place // inner.to(WIDE)
    element = begin + tl.arange(0, BLOCK)
    return element, run + runs, place - runs * inner.to(WIDE), element < total


@triton.jit
def _affine(x, scale, shift, channel, mask):
    if scale is not None:
        x = x * tl.load(scale + channel, mask=mask, other=0).to(x.dtype)
    if shift is not None:
        x = x + tl.load(shift + channel, mask=mask, other=0).to(x.dtype)
    return x


@triton.jit(do_not_specialize=["starts", "channels", "firsts"])
def concat_kernel(
    maps, starts, channels, firsts, scale, shift, out, count, outer, step, width,
    COMPUTE: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) % count
    channel0, number = starts_of(firsts, m, COUNT), starts_of(channels, m, COUNT)
    inner = number * step
    element, run, place, mask = _places(tl.program_id(0) // count, tl.maximum(inner, 1), outer * inner, WIDE, BLOCK)
    x = tl.load(maps + starts_of(starts, m, COUNT) + element, mask=mask, other=0).to(COMPUTE)
    y = _affine(x, scale, shift, channel0 + place // step, mask)
    if RELU:
        y = tl.where(y <= 0, 0.0, y)  # NaN stays, as in torch
    tl.store(out + run * width * step + channel0 * step + place, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["starts"])
def mean_map_kernel(
    maps, starts, scale, shift, out, count, outer, step, width, sum_before, all_maps,
    COMPUTE: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr, COUNT: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Compute a block of the mean, with ``sum_before`` from earlier launches."""
    inner = tl.cast(width, tl.int64) * step
    element, _, place, mask = _places(tl.program_id(0), inner, outer * inner, WIDE, BLOCK)
    member = tl.arange(0, MEMBERS)
    start = starts_of(starts, member, COUNT)
    total = tl.zeros([BLOCK], COMPUTE)
    if not FIRST:
        total += tl.load(sum_before + element, mask=mask, other=0)
    for m in range(count):
        x = tl.load(maps + pick(start, member, m) + element, mask=mask, other=0).to(COMPUTE)
        y = _affine(x, scale, shift, m * width + place // step, mask)
        if RELU:
            y = tl.where(y <= 0, 0.0, y)
        total += y
    if LAST:
        tl.store(out + element, (total / all_maps).to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(sum_before + element, total, mask=mask)


@triton.jit
def _pass_gradient(grad, at_grad, maps, at_map, out, scale, shift, channel, mask, all_maps,
            COMPUTE: tl.constexpr, RELU: tl.constexpr, MEAN: tl.constexpr):  # fmt: skip
    """Return the gradient by the activation's input, and the map's values (or the gradient)."""
    g = tl.load(grad + at_grad, mask=mask, other=0).to(COMPUTE)
    if MEAN:
        g = g / all_maps
    x = g
    if maps is not None:
        x = tl.load(maps + at_map, mask=mask, other=0).to(COMPUTE)
    if RELU:
        if maps is not None:
            y = _affine(x, scale, shift, channel, mask)
        else:
            y = tl.load(out + at_grad, mask=mask, other=0).to(COMPUTE)
        g = tl.where(y <= 0, 0.0, g)
    return g, x


@triton.jit(do_not_specialize=["starts", "targets", "channels", "firsts"])
def back_kernel(
    grad, maps, out, starts, target, targets, channels, firsts, scale, shift, count, outer, step, width, all_maps,
    COMPUTE: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr, MEAN: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write each map's gradient, by adjacent programs, so that a mean's gradient is read once."""
    m = tl.program_id(0) % count
    channel0, number = starts_of(firsts, m, COUNT), starts_of(channels, m, COUNT)
    inner = number * step
    element, run, place, mask = _places(tl.program_id(0) // count, tl.maximum(inner, 1), outer * inner, WIDE, BLOCK)
    at_grad = element if MEAN else run * width * step + channel0 * step + place
    channel = channel0 + place // step
    at_map = starts_of(starts, m, COUNT) + element
    g, _ = _pass_gradient(grad, at_grad, maps, at_map, out, scale, shift, channel, mask, all_maps, COMPUTE, RELU, MEAN)
    if scale is not None:
        g = g * tl.load(scale + channel, mask=mask, other=0).to(COMPUTE)
    place = starts_of(targets, m, COUNT) + element
    tl.store(target + place, g.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["starts", "channels", "firsts"])
def sums_kernel(
    grad, maps, out, starts, channels, firsts, scale, shift, by_scale, by_shift,
    count, batch, positions, width, total, tiles, span, all_maps,
    COMPUTE: tl.constexpr, RELU: tl.constexpr, MEAN: tl.constexpr, LAST: tl.constexpr, COUNT: tl.constexpr,
    CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Sum over batch and ``span`` positions for scale and shift, fp64 ``[splits, total]``."""
    program = tl.program_id(0)
    m = program % count
    tile, split = program // count % tiles, (program // count // tiles).to(tl.int64)
    channel0, number = starts_of(firsts, m, COUNT), starts_of(channels, m, COUNT)
    local = (tile.to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    channel = channel0 + local
    start = starts_of(starts, m, COUNT)
    to_scale = tl.zeros([CHANNELS, PLACES], tl.float64)
    to_shift = tl.zeros([CHANNELS, PLACES], tl.float64)
    size = tl.cast(batch, tl.int64) * positions
    in_grad = local if MEAN else channel
    for begin in range(split * span, tl.minimum((split + 1) * span, size), PLACES):
        q = (begin + tl.arange(0, PLACES))[None, :]
        mask = (local < number) & (q < size)
        if LAST:
            at_grad, at_map = q * width + in_grad, start + q * number + local
        else:
            b, p = q // positions, q % positions
            at_grad = (b * width + in_grad) * positions + p
            at_map = start + (b * number + local) * positions + p
        g, x = _pass_gradient(
            grad, at_grad, maps, at_map, out, scale, shift, channel, mask, all_maps, COMPUTE, RELU, MEAN
        )
        to_shift += g.to(tl.float64)
        if by_scale is not None:
            to_scale += g.to(tl.float64) * x.to(tl.float64)
    place = split * total + channel0 + tile.to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    real = tile * CHANNELS + tl.arange(0, CHANNELS) < number
    if by_scale is not None:
        tl.store(by_scale + place, tl.sum(to_scale, axis=1), mask=real)
    if by_shift is not None:
        tl.store(by_shift + place, tl.sum(to_shift, axis=1), mask=real)


class TritonFuse:
    """:class:`fedkern.ops._fuse.kernels.FuseKernels` in Triton."""

    views = False

    def forward(self, features: Sequence[Tensor], call: FuseCall) -> Tensor:
        scale, shift, relu, mean, channels, channels_last = call
        template = features[0]
        shape, width = template.shape, channels[0] if mean else sum(channels)
        out = empty_map((shape[0], width, *shape[2:]), channels_last, template)
        if not out.numel():
            return out
        maps = [_dense(x, channels_last) for x in features]
        outer, step = _runs(shape, channels_last)
        scale, shift = _vector(scale), _vector(shift)
        meta = {"COMPUTE": COMPUTE[out.dtype], "WIDE": _index(max(channels) * step), "RELU": relu, "BLOCK": BLOCK}
        if not mean:
            firsts = _firsts(channels)
            tiles = cdiv(max(channels) * outer * step, BLOCK)
            for group in _groups(len(maps)):
                starts = tensor_starts(maps[group])
                launch(
                    concat_kernel, tiles * len(maps[group]), out.device, maps[group][0], starts,
                    encode_numbers(channels[group]), encode_numbers(firsts[group]), scale, shift, out, len(maps[group]),
                    outer, step, width, COUNT=len(starts), **meta,
                )  # fmt: skip
            return out
        total = out
        if len(maps) > MAPS:
            total = torch.empty(out.numel(), dtype=torch.float64 if out.dtype is torch.float64 else torch.float32,
                                device=out.device)  # fmt: skip
        for group in _groups(len(maps)):
            starts, begin = tensor_starts(maps[group]), group.start * width
            launch(
                mean_map_kernel, cdiv(out.numel(), BLOCK), out.device, maps[group][0], starts,
                None if scale is None else scale[begin:], None if shift is None else shift[begin:], out,
                len(maps[group]), outer, step, width, total, len(maps), COUNT=len(starts), MEMBERS=len(starts),
                FIRST=group.start == 0, LAST=group.stop >= len(maps), **meta,
            )  # fmt: skip
        return out

    def backward(
        self, grad: Tensor, features: Sequence[Tensor] | None, out: Tensor | None, call: FuseCall, needs: FuseNeeds
    ) -> FuseGradients:
        scale, shift, relu, mean, channels, channels_last = call
        batch, positions, device = grad.shape[0], grad.shape[2:], grad.device
        need_features, need_scale, need_shift = needs
        targets = [
            empty_map((batch, count, *positions), channels_last, grad) if need else None
            for count, need in zip(channels, need_features, strict=True)
        ]
        # Without elements no kernel runs, and sums are zeros.
        total, width = sum(channels), grad.shape[1]
        if not grad.numel() or not batch * math.prod(positions):
            zeros = torch.zeros(total, dtype=torch.float64, device=device)
            return targets, _like(zeros, scale, need_scale), _like(zeros, shift, need_shift)
        grad = _dense(grad, channels_last)
        out = None if out is None else _dense(out, channels_last)
        maps = None if features is None else [_dense(x, channels_last) for x in features]
        outer, step = _runs(grad.shape, channels_last)
        firsts, counts = _firsts(channels), list(channels)
        vectors = (_vector(scale), _vector(shift))
        meta = {"COMPUTE": COMPUTE[grad.dtype], "RELU": relu, "MEAN": mean}
        # Without ReLU only scale's gradient needs the maps.
        seen = maps if relu else None
        indices = [m for m, target in enumerate(targets) if target is not None]
        # Only maps that want a gradient are launched.
        for group in _groups(len(indices)):
            members = indices[group]
            outputs = [x for x in (targets[m] for m in members) if x is not None]
            read = None if seen is None else [seen[m] for m in members]
            places = tensor_starts(outputs)
            launch(
                back_kernel, cdiv(max(counts[m] for m in members) * outer * step, BLOCK) * len(members), device, grad,
                None if read is None else read[0], out,
                encode_numbers([0] * len(places)) if read is None else tensor_starts(read), outputs[0], places,
                encode_numbers(counts[m] for m in members), encode_numbers(firsts[m] for m in members),
                *vectors, len(members), outer, step, width, len(channels), COUNT=len(places), BLOCK=BLOCK,
                WIDE=_index(max(counts) * step), **meta,
            )  # fmt: skip
        by_scale = by_shift = None
        if need_scale or need_shift:
            # Tiles are wide in channels where channels are adjacent in memory, and wide in positions otherwise.
            size = batch * math.prod(positions)
            channel_tile = min(power_of_two(max(counts)), 32 if channels_last or step == 1 else 4)
            place_tile = min(power_of_two(size), BLOCK // channel_tile)
            tiles = cdiv(max(counts), channel_tile)
            blocks = cdiv(size, place_tile)
            splits = max(1, min(blocks, 4 * processors(device) // (tiles * len(counts)), 256))
            span = cdiv(blocks, splits) * place_tile
            splits = cdiv(size, span)
            by_scale, by_shift = (
                torch.empty(splits, total, dtype=torch.float64, device=device) if need else None
                for need in (need_scale, need_shift)
            )
            read = maps if need_scale else seen
            for some_maps in _groups(len(counts)):
                number = len(counts[some_maps])
                channel_table = encode_numbers(counts[some_maps])
                launch(
                    sums_kernel, number * tiles * splits, device, grad, None if read is None else read[some_maps][0],
                    out, encode_numbers([0] * len(channel_table)) if read is None else tensor_starts(read[some_maps]),
                    channel_table, encode_numbers(firsts[some_maps]), *vectors, by_scale, by_shift, number, batch,
                    math.prod(positions), width, total, tiles, span, len(counts), LAST=channels_last,
                    COUNT=len(channel_table), CHANNELS=channel_tile, PLACES=place_tile, **meta,
                )  # fmt: skip
        return (
            targets,
            None if by_scale is None else _like(by_scale.sum(0), scale, True),
            None if by_shift is None else _like(by_shift.sum(0), shift, True),
        )


def _like(sums: Tensor, vector: Tensor | None, need: bool) -> Tensor | None:
    return sums.to(vector.dtype) if need and vector is not None else None


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _dense(x: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        return x.contiguous()
    moved = x.movedim(1, -1)
    return x if moved.is_contiguous() else moved.contiguous().movedim(-1, 1)


def _runs(shape: Sequence[int], channels_last: bool) -> tuple[int, int]:
    size = math.prod(shape[2:])
    return (shape[0] * size, 1) if channels_last else (shape[0], size)


def _index(inner: int) -> tl.dtype:
    return tl.int32 if inner + BLOCK < 1 << 31 else tl.int64


def _firsts(channels: Sequence[int]) -> list[int]:
    return [sum(channels[:m]) for m in range(len(channels))]


def _groups(count: int) -> list[slice]:
    return [slice(begin, begin + MAPS) for begin in range(0, count, MAPS)]
