"""erase_boxes, keep_boxes: the kernel interface, and the kernels of the CPU core."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fedkern.ops._core.backend import DTYPES, address
from fedkern.ops._core.memory import fresh


class BoxesKernel(Protocol):
    """One backend's implementation."""

    def fill(self, images: Tensor, boxes: Tensor, fill: Tensor, keep: bool, out: Tensor) -> None:
        """Writes ``images`` to ``out``, with ``fill`` for pixels inside any box or (``keep``) outside all boxes.

        Args:
            images: ``[B, C, H, W]``, any real dtype and strides.
            boxes: ``[B, n, 4]``, any real dtype; a box with a NaN is empty.
            fill: ``[1 or B, C]``, the images' dtype.
            keep: whether the boxes are kept, as in keep_boxes, or erased.
            out: like ``images``, just allocated; samples are dense in some order of axes.
        """


class CpuBoxes:
    """:class:`BoxesKernel` on ``fedkern._cpu``."""

    def __init__(self, core: Any) -> None:
        self.core = core

    def fill_contiguous(self, images: Tensor, boxes: Tensor, fill: Tensor, keep: bool) -> Tensor:
        """:meth:`fill` of contiguous images in one call of the core, which also checks the boxes for NaN.

        ``boxes`` are contiguous fp32 or fp64, ``fill`` is ``[C]`` and contiguous.
        """
        out = torch.empty_like(images)
        batch, channels, height, width = images.shape
        self.core.fill_boxes(
            images.element_size(),
            batch,
            channels,
            height,
            width,
            boxes.shape[1],
            address(images, "images"),
            address(boxes, "boxes"),
            DTYPES[boxes.dtype],
            fill.data_ptr(),
            0 if keep else 1,
            fresh(self.core, out).data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def fill(self, images: Tensor, boxes: Tensor, fill: Tensor, keep: bool, out: Tensor) -> None:
        if not pixels_in_step(images) or not pixels_in_step(out):
            whole = torch.empty_like(out, memory_format=torch.contiguous_format)
            self.fill(images.contiguous(), boxes, fill, keep, whole)
            out.copy_(whole)
            return
        batch, channels, height, width = images.shape
        pixels, threads = height * width, torch.get_num_threads()
        corners = boxes.to(torch.float64).contiguous()
        mask = torch.empty(batch, pixels, dtype=torch.uint8)
        place = address(corners, "boxes")
        self.core.box_mask(batch, boxes.shape[1], height, width, place, mask.data_ptr(), threads)
        fill = fill.contiguous()
        self.core.box_fill(
            *(images.element_size(), batch, channels, pixels),
            *(images.stride(0), images.stride(1), pixel_stride(images)),
            *(out.stride(0), out.stride(1), pixel_stride(out)),
            *(address(images, "images"), mask.data_ptr(), 0 if keep else 1),
            *(fill.data_ptr(), channels if len(fill) > 1 else 0, fresh(self.core, out).data_ptr(), threads),
        )


def pixels_in_step(images: Tensor) -> bool:
    """True where one stride leads from pixel to pixel through all rows, as in contiguous and channels-last images."""
    _, _, height, width = images.shape
    if not images.numel():  # contiguous() would not change the strides
        return True
    return width <= 1 or height <= 1 or images.stride(2) == width * images.stride(3)


def pixel_stride(images: Tensor) -> int:
    """The stride from pixel to pixel of :func:`pixels_in_step` images."""
    return images.stride(3) if images.shape[3] > 1 else images.stride(2)
