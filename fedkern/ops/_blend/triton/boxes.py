"""erase_boxes and keep_boxes in Triton: one pass over the images, no mask in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedkern.ops._core.triton.launch import cdiv, launch, power_of_two

# Pixels times channels of a program's tile.
TILE = 1024

# Elements are only moved: an integer type of the same size serves every dtype.
MOVED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Boxes of these dtypes, and centres of pixels in images of up to 2^22 rows or columns, are exact in fp32; others need
# fp64.
NARROW = frozenset({torch.float32, torch.bfloat16, torch.float16})
LONGEST = 1 << 22


@triton.jit
def fill_kernel(
    images,
    boxes,
    fill,
    out,
    channels,
    height,
    width,
    count,
    image_0,
    image_1,
    image_2,
    image_3,
    out_0,
    out_1,
    out_2,
    out_3,
    box_0,
    box_1,
    box_2,
    fill_0,
    fill_1,
    tiles,
    KEEP: tl.constexpr,
    IN_STEP: tl.constexpr,
    COMPARE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    pixel = (program % tiles).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    # cast(), not to(): a size of 1 reaches the kernel as a plain number
    valid = pixel < tl.cast(height, tl.int64) * width
    i, j = pixel // width, pixel % width
    y, x = i.to(COMPARE) + 0.5, j.to(COMPARE) + 0.5
    inside = pixel < 0
    box = boxes + image * box_0
    for _ in range(count):
        x1, y1 = tl.load(box).to(COMPARE), tl.load(box + box_2).to(COMPARE)
        x2, y2 = tl.load(box + 2 * box_2).to(COMPARE), tl.load(box + 3 * box_2).to(COMPARE)
        inside = inside | ((x1 <= x) & (x < x2) & (y1 <= y) & (y < y2))
        box += box_1
    if KEEP:
        inside = ~inside
    if IN_STEP:  # one stride leads through all pixels, so that accesses of neighbours coalesce
        source, target = pixel * image_3, pixel * out_3
    else:
        source, target = i * image_2 + j * image_3, i * out_2 + j * out_3
    for first in range(0, channels, CHANNELS):
        channel = (first + tl.arange(0, CHANNELS)).to(tl.int64)
        real = channel < channels
        mask = real[:, None] & valid[None, :]
        value = tl.load(fill + image * fill_0 + channel * fill_1, mask=real, other=0)
        # A replaced pixel is not read.
        original = tl.load(
            images + image * image_0 + (channel * image_1)[:, None] + source[None, :],
            mask=mask & ~inside[None, :],
            other=0,
        )
        result = tl.where(inside[None, :], value[:, None], original)
        tl.store(out + image * out_0 + (channel * out_1)[:, None] + target[None, :], result, mask=mask)


def pixels_in_step(images: Tensor) -> bool:
    """True where one stride leads from pixel to pixel through all rows, as in contiguous and channels-last images."""
    _, _, height, width = images.shape
    if not images.numel():  # contiguous() would not change the strides
        return True
    return width <= 1 or height <= 1 or images.stride(2) == width * images.stride(3)


def pixel_stride(images: Tensor) -> int:
    """The stride from pixel to pixel of :func:`pixels_in_step` images."""
    return images.stride(3) if images.shape[3] > 1 else images.stride(2)


class TritonBoxes:
    """The method of :class:`fedkern.ops._blend.kernels.BoxesKernels` in Triton."""

    def fill(self, images: Tensor, boxes: Tensor, fill: Tensor, keep: bool, out: Tensor) -> None:
        if not out.numel():
            return
        batch, channels, height, width = images.shape
        moved = MOVED[images.element_size()]
        narrow = boxes.dtype in NARROW and max(height, width) <= LONGEST
        channel_tile = min(power_of_two(channels), 16)
        pixel_tile = min(power_of_two(height * width), TILE // channel_tile)
        in_step = pixels_in_step(images) and pixels_in_step(out)
        tiles = cdiv(height * width, pixel_tile)
        launch(
            fill_kernel, batch * tiles, images.device, images.view(moved), boxes, fill.view(moved), out.view(moved),
            channels, height, width, boxes.shape[1], *images.stride()[:3], pixel_stride(images), *out.stride()[:3],
            pixel_stride(out), *boxes.stride(), fill.stride(0) if len(fill) > 1 else 0, fill.stride(1), tiles,
            KEEP=keep, IN_STEP=in_step, COMPARE=tl.float32 if narrow else tl.float64, CHANNELS=channel_tile,
            PIXELS=pixel_tile,
        )  # fmt: skip
