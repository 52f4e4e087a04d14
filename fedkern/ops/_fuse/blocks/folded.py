"""FusedBlocks: a convolution's weights with the batch norm behind it folded into them."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from fedkern.ops._fuse.blocks.layers import FusedBatchNorm, FusedConv
from fedkern.ops._fuse.blocks.onednn import Prepared


class Folded:
    """Weights of one folded convolution in evaluation mode, computed again when a source tensor has changed."""

    def __init__(self, conv: FusedConv, norm: FusedBatchNorm | None) -> None:
        self.conv, self.norm = conv, norm
        self._key: tuple[Any, ...] = ()
        self._packed: tuple[Tensor, int, Tensor] | None = None  # made of what, for what, what; replaced as a whole

    def refresh(self) -> None:
        conv, norm = self.conv, self.norm
        sources = [conv.weight, conv.bias]
        if norm is not None:
            sources += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        key: tuple[Any, ...]
        try:
            key = tuple((t.data_ptr(), t._version, t.dtype) for t in sources if isinstance(t, Tensor))
        except RuntimeError:
            # Inference tensors do not count their changes, so that every call folds again.
            key = (object(),)
        if key == self._key:
            return
        weight = cast(Tensor, conv.weight).detach()
        bias = None if conv.bias is None else conv.bias.detach()
        if norm is not None:
            scale, shift = (t.detach() for t in norm.affine())
            weight = weight * scale.to(weight.dtype).reshape(-1, 1, 1, 1)
            bias = shift if bias is None else bias * scale + shift
        rows = weight.shape[0] // conv.branches
        if weight.shape != conv.shape or (bias is not None and bias.shape != weight.shape[:1]):
            # The core reads by address, and would read more values than there are.
            shapes = f"{list(weight.shape)}" if bias is None else f"{list(weight.shape)} and {list(bias.shape)}"
            raise ValueError(
                f"folded, a convolution must have weights {list(conv.shape)} and a bias each, not {shapes}"
            )
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = None if bias is None else bias.to(weight.dtype).contiguous().resolve_neg()
        tensors = (self.weight,) if self.bias is None else (self.weight, self.bias)
        self.plain = all(t.dtype is torch.float32 and t.device.type == "cpu" for t in tensors)
        self.weights = [w.contiguous(memory_format=torch.channels_last) for w in self.weight.split(rows)]
        self.biases = [None] * conv.branches if self.bias is None else list(self.bias.split(rows))
        self.prepared = Prepared()  # last: another thread that reads it first reads weights no older than it
        # Kept alive, so that no other tensor can take the same addresses and pass for unchanged.
        self._sources = [t.detach() for t in sources if isinstance(t, Tensor)]
        self._key = key

    def forget(self) -> None:
        """Makes the next :meth:`refresh` compute the weights again."""
        self._key = (None,)

    def packed(self, largest: int) -> Tensor:
        """The weights for the direct algorithm with blocks of at most ``largest`` channels."""
        weight, entry = self.weight, self._packed
        if entry is None or entry[0] is not weight or entry[1] != largest:
            entry = self._packed = weight, largest, pack(weight, self.conv.branches, largest)
        return entry[2]


def pack(weight: Tensor, branches: int, largest: int) -> Tensor:
    """Weights ``[M * C', C, kh, kw]`` as ``[M, blocks, C * kh * kw, block]``.

    The output channels are cut into equal blocks of at most ``largest``, the last one filled up with zeros.
    """
    rows = weight.shape[0] // branches
    blocks = max(1, math.ceil(rows / largest))
    block = max(1, math.ceil(rows / blocks))
    taps = math.prod(weight.shape[1:])
    padded = weight.new_zeros((branches, blocks * block, taps))
    padded[:, :rows] = weight.reshape(branches, rows, taps)
    return padded.unflatten(1, (blocks, block)).transpose(2, 3).contiguous()
