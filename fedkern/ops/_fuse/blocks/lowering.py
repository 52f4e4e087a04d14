"""FusedBlocks in evaluation mode: batch norms, ReLUs and shortcut sums folded into convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.ops._core.memory import fresh
from fedkern.ops._core.private_torch import functorch_active
from fedkern.ops._fuse.blocks import conv
from fedkern.ops._fuse.blocks.folded import Folded
from fedkern.ops._fuse.blocks.layers import FusedBatchNorm
from fedkern.ops._fuse.blocks.onednn import convolve
from fedkern.ops._fuse.blocks.shapes import POOLS
from fedkern.ops._fuse.blocks.trace import Step
from fedkern.ops._fuse.fuse import fuse_concat
from fedkern.ops._fuse.maps import empty_map, order_of

# Bytes of the widest map that the direct lowering holds at once: with what is read for it, this fits into a core's L2.
CHUNK_BYTES = 1 << 21

# oneDNN's results above FRESH_BYTES are computed in pieces of some samples.  Whole, their memory would come page by
# page from the system every time (glibc's malloc keeps no larger block): a third of the time of a 1x1 convolution.
FRESH_BYTES = 32 << 20
PIECE_BYTES = 8 << 20


class Fold(NamedTuple):
    """A convolution with the steps folded into it, or another step unchanged.

    Attributes:
        step: the step; a convolution's inputs are its map and, with a shortcut, the value added.
        norm: name of the batch norm after the convolution, or None.
        relu: whether a ReLU comes last.
        value: number of the value that the fold computes.
    """

    step: Step
    norm: str | None
    relu: bool
    value: int


def fold_steps(steps: Sequence[Step], foldable: dict[str, nn.Module]) -> list[Fold]:
    """Joins convolution, batch norm, sum and ReLU where no other step reads the values in between.

    ``foldable``: the fused layers by name; batch norms that keep running statistics can be folded.
    """
    readers: dict[int, list[int]] = {}
    for i, step in enumerate(steps):
        for value in step.inputs:
            readers.setdefault(value, []).append(i)
    absorbed: set[int] = set()
    folds: list[Fold] = []
    for i, step in enumerate(steps):
        if i in absorbed:
            continue
        fold = Fold(step, None, False, i + 1)
        while step.kind == "conv" and len(readers.get(fold.value, ())) == 1:
            (at,) = readers[fold.value]
            after = steps[at]
            plain = not fold.relu and len(fold.step.inputs) == 1
            layer = foldable.get(after.module)
            if after.kind == "norm" and plain and fold.norm is None and _folds(layer) and after.inputs[0] == i + 1:
                fold = fold._replace(norm=after.module)
            elif after.kind == "add" and plain and len(set(after.inputs)) == 2 and at not in absorbed:
                (other,) = (value for value in after.inputs if value != fold.value)
                fold = fold._replace(step=step._replace(inputs=(*step.inputs, other)))
            elif after.kind == "relu" and not fold.relu:
                fold = fold._replace(relu=True)
            else:
                break
            absorbed.add(at)
            fold = fold._replace(value=at + 1)
        folds.append(fold)
    return sorted(folds, key=lambda f: f.value)


def _folds(layer: nn.Module | None) -> bool:
    return isinstance(layer, FusedBatchNorm) and layer.track


class FoldedBlocks:
    """The folded steps of FusedBlocks and the ways to run them."""

    def __init__(self, steps: Sequence[Step], layers: dict[str, nn.Module], branches: int) -> None:
        self.branches, self.layers = branches, layers
        self.folds = fold_steps(steps, layers)
        self.weights = {
            fold.value: Folded(layers[fold.step.module], layers.get(fold.norm) if fold.norm else None)  # type: ignore[arg-type]
            for fold in self.folds
            if fold.step.kind == "conv"
        }
        # Whether samples are independent: batch norms without running statistics use the whole batch.
        self.by_sample = all(_folds(layer) for layer in layers.values() if isinstance(layer, FusedBatchNorm))
        # Torch pools contiguous maps value by value, which takes longer than the convolutions around it.
        self.slow_pools = any(isinstance(layer, POOLS) and not halves(layer) for layer in layers.values())

    def forget(self) -> None:
        """Makes the next call fold all weights again."""
        for folded in self.weights.values():
            folded.forget()

    def grouped(self, x: Tensor, shared: bool) -> Tensor:
        """All branches at once, channels-last."""
        x = channels_last(x)
        core = conv.core_for(x) if self.by_sample and x.dim() == 4 else None
        widest = max([folded.conv.shape[0] for folded in self.weights.values()], default=0)
        sample = widest * x.shape[2] * x.shape[3] * x.itemsize if core is not None else 0
        if x.shape[0] * sample <= FRESH_BYTES:
            return self._grouped(x, shared)
        step = max(1, PIECE_BYTES // sample)
        out: Tensor | None = None
        for begin in range(0, x.shape[0], step):
            piece = self._grouped(x[begin : begin + step], shared)
            if out is None:
                shape = (x.shape[0], *piece.shape[1:])
                out = fresh(core, empty_map(shape, piece.dim() == 4, piece))
            out[begin : begin + step] = piece
        assert out is not None
        return out

    def _grouped(self, x: Tensor, shared: bool) -> Tensor:
        values: dict[int, tuple[Tensor, bool]] = {0: (x, shared)}
        for fold in self.folds:
            step = fold.step
            operands = [values[value] for value in step.inputs]
            if step.kind != "conv":
                values[fold.value] = run_step(step, self.layers.get(step.module), operands, self.branches)
                continue
            folded = self.weights[fold.value]
            folded.refresh()
            conv = folded.conv
            (y, one), *rest = operands
            if one and conv.groups > 1:
                y, one = repeated(y, self.branches), False
            groups = conv.groups if one else conv.groups * self.branches
            other = None
            if rest:
                other = repeated(rest[0][0], self.branches) if rest[0][1] else rest[0][0]
            values[fold.value] = (
                convolve(conv, folded.prepared, None, y, folded.weight, folded.bias, groups, other, fold.relu),
                False,
            )
        y, one = values[self.folds[-1].value]
        return repeated(y, self.branches) if one else y

    def separate(self, x: Tensor, shared: bool) -> list[Tensor]:
        """One branch after the other, channels-last, each map still in cache when the next layer reads it."""
        inputs = [channels_last(x)] * self.branches if shared else list(map(channels_last, x.chunk(self.branches, 1)))
        for folded in self.weights.values():
            folded.refresh()
        return [self._branch(m, inputs[m]) for m in range(self.branches)]

    def plain(self) -> bool:
        """Computes changed weights again; returns whether all are fp32 on the CPU, as :meth:`direct` needs them."""
        for folded in self.weights.values():
            folded.refresh()
        return all(folded.plain for folded in self.weights.values())

    def direct(self, core: Any, x: Tensor, shared: bool) -> Tensor:
        """All branches at once by the compiled core, contiguous, a few samples at a time so that maps stay in cache.

        Call :meth:`plain` first; :func:`fedkern.ops._fuse.blocks.shapes.survey` must allow the shape of ``x``.
        """
        x = x.contiguous()
        widest = max([folded.weight.shape[0] for folded in self.weights.values()], default=1)
        samples = max(1, CHUNK_BYTES // max(1, widest * x.shape[2] * x.shape[3] * x.itemsize))
        out: Tensor | None = None
        for begin in range(0, max(1, x.shape[0]), samples):
            out = self._direct_chunk(core, x, begin, min(x.shape[0], begin + samples), shared, out)
        assert out is not None
        return out

    def _direct_chunk(self, core: Any, x: Tensor, begin: int, end: int, shared: bool, out: Tensor | None) -> Tensor:
        """Samples begin to end; returns the whole result, allocated by the first chunk."""
        values: dict[int, tuple[Tensor, bool]] = {0: (x[begin:end], shared)}
        last = self.folds[-1].value
        for fold in self.folds:
            step = fold.step
            operands = [values[value] for value in step.inputs]
            if step.kind != "conv":
                layer = self.layers.get(step.module)
                if halves(layer):
                    values[fold.value] = (halved(operands[0][0]), operands[0][1])
                else:
                    values[fold.value] = run_step(step, layer, operands, self.branches)
                continue
            folded = self.weights[fold.value]
            y, one = operands[0]
            shape = folded.conv.result_shape(y, folded.weight)
            if fold.value == last:
                if out is None:
                    out = fresh(core, x.new_empty((x.shape[0], *shape[1:])))
                result = out[begin:end]
            else:
                result = x.new_empty(shape)
            other, other_one = operands[1] if len(operands) > 1 else (None, False)
            conv.convolve(core, folded, y.contiguous(), one, other, other_one, fold.relu, result)
            values[fold.value] = (result, False)
        if self.folds[-1].step.kind != "conv":
            y, one = values[last]
            y = repeated(y, self.branches) if one else y
            if out is None:
                out = x.new_empty((x.shape[0], *y.shape[1:]))
            out[begin:end] = y
        assert out is not None
        return out

    def _branch(self, m: int, x: Tensor) -> Tensor:
        values = {0: x}
        for fold in self.folds:
            step = fold.step
            operands = [values[value] for value in step.inputs]
            if step.kind == "conv":
                folded = self.weights[fold.value]
                other = operands[1] if len(operands) > 1 else None
                groups = folded.conv.groups
                prepared, weight, bias = folded.prepared, folded.weights[m], folded.biases[m]
                y = convolve(folded.conv, prepared, m, operands[0], weight, bias, groups, other, fold.relu)
            else:
                y = run_step_of(step, self.layers.get(step.module), operands, m)
            values[fold.value] = y
        return values[self.folds[-1].value]


def channels_last(x: Tensor) -> Tensor:
    if x.dim() != 4 or functorch_active():  # vmap does not support memory formats
        return x
    return x.contiguous(memory_format=torch.channels_last)


def halves(layer: nn.Module | None) -> bool:
    """Whether the layer is a ``MaxPool2d(2)``."""
    if not isinstance(layer, nn.MaxPool2d):
        return False
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    pairs = tuple((value, value) if isinstance(value, int) else tuple(value) for value in settings)
    return pairs == ((2, 2), (2, 2), (0, 0), (1, 1)) and not layer.ceil_mode


def halved(x: Tensor) -> Tensor:
    """``MaxPool2d(2)`` of a contiguous map, in a tenth of the time of torch's own, which goes value by value."""
    height, row = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    y = torch.maximum(x[:, :, 0:height:2, :row], x[:, :, 1:height:2, :row])
    return torch.maximum(y[..., 0::2], y[..., 1::2])


def repeated(x: Tensor, branches: int) -> Tensor:
    """A shared map, repeated for every branch along the channels."""
    wide = x.unsqueeze(1).expand(x.shape[0], branches, *x.shape[1:])
    if x.dim() == 4 and not functorch_active() and order_of(x) == 1:
        flat = x.permute(0, 2, 3, 1).repeat(1, 1, 1, branches)
        return flat.permute(0, 3, 1, 2)
    return wide.flatten(1, 2)


def run_step(step: Step, layer: Any, operands: Sequence[tuple[Tensor, bool]], branches: int) -> tuple[Tensor, bool]:
    """One step for all branches; each value comes with a flag: whether all branches share the value."""
    x, shared = operands[0]
    if step.kind in ("conv", "linear", "norm"):
        return layer.run(x, shared), False
    if step.kind == "add":
        other, one = operands[1]
        if shared == one:
            total = x + other
        else:
            wide, single = (other, x) if shared else (x, other)
            total, shared = (wide.unflatten(1, (branches, -1)) + single.unsqueeze(1)).flatten(1, 2), False
        return total.to(x.dtype) if step.in_place else total, shared
    return run_same(step, layer, x), shared


def run_step_of(step: Step, layer: Any, operands: Sequence[Tensor], m: int) -> Tensor:
    """One step for branch m."""
    if step.kind in ("conv", "linear", "norm"):
        return layer.run_one(operands[0], m)
    if step.kind == "add":
        total = operands[0] + operands[1]
        return total.to(operands[0].dtype) if step.in_place else total
    return run_same(step, layer, operands[0])


def run_same(step: Step, layer: Any, x: Tensor) -> Tensor:
    """A step that is the same for one branch and for all."""
    if step.kind == "relu":
        return F.relu(x)
    if step.kind == "flatten":
        return x.flatten(1)
    return x if step.kind == "same" else layer(x)


def concatenate(maps: list[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else fuse_concat(maps)
