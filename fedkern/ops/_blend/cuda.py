"""blend and boxes on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._blend.kernels import Launcher
from fedkern.ops._core.backend import address
from fedkern.ops._core.cuda import queue


class CudaBlend(Launcher):
    """:class:`Launcher` on torch's current stream; the device finds the samples that use each background row."""

    def _fresh(self, tensor: Tensor) -> Tensor:
        return tensor

    def _forward(self, *arguments: Any) -> None:
        self.core.blend_forward(*arguments[:-1], *queue(arguments[-1]))

    def _backward(self, *arguments: Any) -> None:
        grad, index = arguments[-2:]
        start = order = None
        if index is not None and arguments[15] is not None:
            ordered, order = torch.sort(index, stable=True)
            rows = torch.arange(arguments[2] + 1, device=grad.device)
            start = torch.searchsorted(ordered, rows)
        self.core.blend_backward(
            *arguments[:-2],
            address(start),
            address(order),
            *queue(grad),
        )


class CudaBoxes:
    """:class:`fedkern.ops._blend.boxes_kernels.BoxesKernel` of ``fedkern._cuda``."""

    def __init__(self, core: Any) -> None:
        self.core = core

    def fill(self, images: Tensor, boxes: Tensor, fill: Tensor, keep: bool, out: Tensor) -> None:
        batch, channels, height, width = images.shape
        corners, fill = boxes.to(torch.float64).contiguous(), fill.contiguous()
        self.core.fill_boxes(
            images.element_size(),
            (batch, boxes.shape[1], channels, height, width),
            images.stride(),
            out.stride(),
            address(images, "images"),
            address(corners, "boxes"),
            fill.data_ptr(),
            channels if len(fill) > 1 else 0,
            keep,
            out.data_ptr(),
            *queue(images),
        )
