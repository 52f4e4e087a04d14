"""blend and boxes: the launchers of both compiled cores, and helpers that Triton's blend shares."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fedkern.ops._core import checks
from fedkern.ops._core.launch import Launcher
from fedkern.ops._core.memory import HUGE

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class BlendCall(NamedTuple):
    """Arguments of blend, without its maps.

    Attributes:
        alpha: ``[B]``, or None where ``value`` is the weight of every foreground.
        indices: ``int64 [B]``, each sample's row of the background, or None for row b.
    """

    alpha: Tensor | None
    value: float
    indices: Tensor | None
    background_rows: int


def sample_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """Return ``strides``, or None unless a sample is dense, in any order of axes."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return None
            expected *= size
    return tuple(strides)


def output_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Return a result's strides: dense samples in the input's layout if that has no gaps, else contiguous."""
    size = math.prod(shape[1:])
    if size == 0:
        return tuple(strides)
    inner = sample_strides(shape[1:], strides[1:])
    if inner is None:
        inner = tuple(math.prod(shape[axis + 1 :]) for axis in range(1, len(shape)))
    return (size, *inner)


def in_layout(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return ``tensor``, copied unless its samples have the layout of ``strides``."""
    axes = zip(tensor.shape[1:], tensor.stride()[1:], strides[1:], strict=True)
    if all(stride == target or size == 1 for size, stride, target in axes):
        return tensor
    if tensor.dim() and tensor.shape[0] > 1 and not any(tensor.stride()):
        # One value for everything (the gradient of a sum): one sample is enough.
        return in_layout(tensor[:1], strides).expand(tensor.shape)
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def check_memory(foreground: Tensor | None, background: Tensor | None, call: BlendCall) -> None:
    """Raise RuntimeError, for every backend, if memory that the backward pass reads was freed."""
    if call.indices is not None:
        checks.check_memory(call.indices, "index")
    if call.alpha is not None:
        for tensor, name in ((call.alpha, "alpha"), (foreground, "foreground"), (background, "background")):
            if tensor is not None:
                checks.check_memory(tensor, name)


def group_users(index: Tensor, background_rows: int) -> tuple[Tensor, Tensor]:
    """Return (start, order): the users of background row n are ``order[start[n] : start[n + 1]]``, ascending."""
    ordered, order = torch.sort(index, stable=True)
    return torch.searchsorted(ordered, torch.arange(background_rows + 1, device=index.device)), order


class _Launcher(Launcher):
    def __init__(self, core: ModuleType) -> None:
        super().__init__(core)
        self._wide = (torch.float64,) if self.gpu else (torch.float32, torch.float64)

    def wide(self, tensor: Tensor) -> Tensor:
        """Convert to a dtype that the core accepts as fp64 (the CPU core converts fp32 itself)."""
        return tensor if tensor.dtype in self._wide else tensor.double()


class BlendKernels(_Launcher):
    """blend of both compiled cores.

    A core returns False, and does nothing, if the samples have gaps or differ in layout: asking in Python would take
    longer than a small blend.
    """

    def forward(self, foreground: Tensor, background: Tensor, call: BlendCall) -> Tensor:
        """Return the result, with :func:`output_strides` of the foreground, for maps of one dtype."""
        alpha, value, index, _ = call
        if alpha is not None:
            alpha = self.wide(alpha)
        out = _empty_like(foreground)
        if out.numel() >= _LARGE:
            self.fresh(out)
        if self.core.blend_forward(foreground, background, index, alpha, value, out, self.at(out)):
            return out
        del out  # its memory can be used again
        strides = output_strides(foreground.shape, foreground.stride())
        out = self.fresh(foreground.new_empty_strided(foreground.shape, strides))
        foreground, background = in_layout(foreground, strides), in_layout(background, strides)
        index = None if index is None else index.contiguous()
        served = self.core.blend_forward(foreground, background, index, alpha, value, out, self.at(out))
        assert served
        return out

    def backward(
        self, grad: Tensor, foreground: Tensor | None, background: Tensor | None, call: BlendCall,
        needs: Sequence[bool], strides: tuple[int, ...] | None = None,
    ) -> Gradients:  # fmt: skip
        """Return the gradients of foreground, background and alpha where ``needs`` asks for them.

        Only alpha's gradient reads the maps. The maps' gradients get the result's ``strides``; None: those of ``grad``.
        """
        # A gradient in the result's layout needs no copy.
        alpha, value, index, background_rows = call
        shape, count, sums = grad.shape, grad.numel(), 1
        to_front = to_back = per_sample = start = order = None
        if count and grad.stride() == strides and grad.is_contiguous():
            if needs[0]:
                to_front = _empty_like(grad)
            if needs[1]:
                equal_rows = background_rows == shape[0]
                to_back = _empty_like(grad) if equal_rows else grad.new_empty((background_rows, *shape[1:]))
        else:
            strides = output_strides(shape, grad.stride() if strides is None else strides)
            grad = in_layout(grad, strides)
            if needs[0]:
                to_front = grad.new_empty_strided(shape, strides)
            if needs[1]:
                to_back = grad.new_empty_strided((background_rows, *shape[1:]), strides)
        if count >= _LARGE or background_rows > shape[0]:
            for gradient in (to_front, to_back):
                if gradient is not None:
                    self.fresh(gradient)
        # A GPU sums alpha's gradient in chunks, added below in a fixed order.
        if needs[2]:
            if self.gpu:
                sums = self.core.blend_chunks(count // max(shape[0], 1))
            per_sample = torch.empty(shape[0] * sums, dtype=torch.float64, device=grad.device)
        else:
            foreground = background = None
        weights = None if alpha is None else self.wide(alpha)
        if self.gpu and index is not None and to_back is not None:
            start, order = self._users(index, background_rows)  # the CPU core finds them itself
        run, trailing = self.core.blend_backward, (to_front, to_back, per_sample, start, order, self.at(grad))
        if not run(grad, foreground, background, index, weights, value, background_rows, *trailing):
            # The batch stride of a result of one sample can be anything; rows of a background must follow each other.
            strides = output_strides(shape, grad.stride())
            if foreground is not None and background is not None:
                foreground, background = in_layout(foreground, strides), in_layout(background, strides)
            index = None if index is None else index.contiguous()
            served = run(grad, foreground, background, index, weights, value, background_rows, *trailing)
            assert served
        if per_sample is not None and alpha is not None:
            if sums != 1:
                per_sample = per_sample.view(shape[0], sums).sum(1)
            per_sample = per_sample.to(alpha.dtype)
        return to_front, to_back, per_sample

    def _users(self, index: Tensor, background_rows: int) -> tuple[Tensor, Tensor]:
        if max(index.shape[0], background_rows) > self.core.blend_few:
            return group_users(index, background_rows)
        index = index.contiguous()
        start, order = index.new_empty(background_rows + 1), _empty_like(index)
        self.core.blend_users(index, start, order, self.at(index))
        return start, order


class BoxesKernels(_Launcher):
    def fill(self, images: Tensor, boxes: Tensor, fill: Tensor, keep: bool, out: Tensor) -> None:
        """Write ``images`` to ``out``, with ``fill`` for pixels inside any box or (``keep``) outside all boxes.

        ``fill`` is ``[1 or B, C]``, ``out`` new and dense. A box with a NaN is empty on a GPU, a ValueError on the CPU.
        """
        boxes, fill = self.wide(boxes).contiguous(), fill.contiguous()
        if self.core.fill_boxes(images, boxes, fill, keep, self.fresh(out), self.at(out)):
            return
        # The CPU core takes one stride from pixel to pixel, as in contiguous and channels-last images.
        dense = torch.empty_like(out, memory_format=torch.contiguous_format)
        self.fill(images.contiguous(), boxes, fill, keep, dense)
        out.copy_(dense)


_empty_like = torch.empty_like
_LARGE = HUGE // 8  # elements from which a tensor can have HUGE bytes
