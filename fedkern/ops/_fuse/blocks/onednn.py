"""FusedBlocks on the CPU: folded convolutions by oneDNN, with the sum and the ReLU that follow them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern.ops._core.private_torch import onednn
from fedkern.ops._fuse.blocks.layers import FusedConv

# Map shapes for which weights are kept: full batches, the last batch, and pieces of both.
SHAPES = 4


class Prepared:
    """Weights in the blocked layouts that oneDNN reads.

    A convolution module reorders its weights in every call, which takes a tenth to a third of its time where maps are
    small.  Frozen weights are reordered only once per shape of the map.  Copies and pickles of this object start empty.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], dict[int | None, Tensor]] = {}

    def __reduce__(self) -> tuple[type[Prepared], tuple[()]]:
        return Prepared, ()

    def get(
        self, reorder: Callable[..., Tensor], weight: Tensor, m: int | None, how: tuple[Any, ...], x: Tensor
    ) -> Tensor:
        """``weight`` (branch ``m``'s; None: all branches') in the layout for convolving ``x`` with settings ``how``."""
        shape = (x.shape, torch.get_num_threads())
        layouts = self._held.get(shape)
        if layouts is None:
            for oldest in list(self._held)[: 1 - SHAPES]:  # a copy: another thread may add and drop shapes
                self._held.pop(oldest, None)
            layouts = self._held[shape] = {}
        layout = layouts.get(m)
        if layout is None:
            layout = layouts[m] = reorder(weight, *how, list(x.shape))
        return layout


def convolve(
    conv: FusedConv,
    prepared: Prepared,
    m: int | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    other: Tensor | None,
    relu: bool,
) -> Tensor:
    """A convolution with branch ``m``'s weights (None: all branches'), then a sum and a ReLU.

    Where oneDNN can, all three are one oneDNN primitive, whose weights ``prepared`` keeps.
    """
    plain = x.device.type == "cpu" and x.dtype is torch.float32 and not torch.is_grad_enabled() and x.numel() > 0
    # Weights of another dtype or device go to conv2d, which raises a readable error.
    alike = weight.dtype is torch.float32 and weight.device.type == "cpu"
    fits = plain and alike and weight.numel() > 0 and not isinstance(conv.padding, str)
    fused = onednn() if fits else None
    if fused is not None:
        how: tuple[Any, ...] = (list(conv.padding), list(conv.stride), list(conv.dilation), groups)
        if other is None:
            weight = prepared.get(fused.reorder, weight, m, how, x)
            return fused.convolve(x, weight, bias, *how, "relu" if relu else "none", [], "")
        last = other.is_contiguous(memory_format=torch.channels_last) and other.dtype is torch.float32
        takes = fused.narrow or (other.shape[1] > 1 and other.shape[2:].numel() > 1)
        if last and takes and other.shape == conv.result_shape(x, weight):
            weight = prepared.get(fused.reorder, weight, m, how, x)
            return fused.convolve_and_add(x, other, weight, bias, *how, "add", None, "relu" if relu else None, [], None)
    y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups)
    if other is not None:
        y = y + other
    return y.relu() if relu else y
