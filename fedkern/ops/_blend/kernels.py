"""blend: launchers of the compiled kernels, which take tensors as pointers, sizes and strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import DTYPES, address
from fedkern.ops._core.memory import HUGE, fresh

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def sample_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """Returns ``strides`` if a sample fills its memory without gaps or repeats, in any order of axes; else None."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return None
            expected *= size
    return tuple(strides)


def output_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of the result for an input of this shape and these strides.

    Samples lie one after another.  Within a sample the result has the input's layout if that has no gaps, otherwise it
    is contiguous.
    """
    size = math.prod(shape[1:])
    if size == 0:
        return tuple(strides)
    inner = sample_strides(shape[1:], strides[1:])
    if inner is None:
        inner = tuple(math.prod(shape[axis + 1 :]) for axis in range(1, len(shape)))
    return (size, *inner)


def _same_layout(shape: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    return all(a == b or size == 1 for size, a, b in zip(shape, one, other, strict=True))


def in_layout(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``tensor``, copied if its samples have another layout than ``strides`` (of a result, batch first)."""
    if _same_layout(tensor.shape[1:], tensor.stride()[1:], strides[1:]):
        return tensor
    if tensor.dim() and tensor.shape[0] > 1 and not any(tensor.stride()):
        # One value for everything (the gradient of a sum): one sample is enough.
        return in_layout(tensor[:1], strides).expand(tensor.shape)
    copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def check_memory(
    index: Tensor | None, foreground: Tensor | None, background: Tensor | None, alpha: Tensor | None
) -> None:
    """Raises RuntimeError, for every backend, if the memory of a tensor that the backward pass reads was freed."""
    address(index, "index")
    if alpha is not None:
        address(alpha, "alpha")
        address(foreground, "foreground")
        address(background, "background")


class Launcher:
    """Calls a compiled core with the arguments that ``fedkern._cpu`` and ``fedkern._cuda`` share."""

    def __init__(self, core: Any) -> None:
        self.core = core

    def forward(
        self, foreground: Tensor, background: Tensor, alpha: Tensor | None, value: float, index: Tensor | None
    ) -> Tensor:
        shape = foreground.shape
        if foreground.is_contiguous() and background.is_contiguous():
            out = torch.empty_like(foreground, memory_format=torch.contiguous_format)
        else:
            strides = output_strides(shape, foreground.stride())
            out = torch.empty_strided(shape, strides, dtype=foreground.dtype, device=foreground.device)
            foreground, background = in_layout(foreground, strides), in_layout(background, strides)
        alpha, index = _small(alpha), None if index is None else index.contiguous()
        self._forward(
            DTYPES[out.dtype],
            shape[0],
            background.shape[0],
            math.prod(shape[1:]),
            address(foreground, "foreground"),
            foreground.stride(0),
            address(background, "background"),
            background.stride(0),
            address(index, "index"),
            address(alpha, "alpha"),
            0 if alpha is None else alpha.stride(0),
            value,
            self._fresh(out).data_ptr(),
            out,
        )
        return out

    def backward(
        self,
        grad: Tensor,
        foreground: Tensor | None,
        background: Tensor | None,
        alpha: Tensor | None,
        value: float,
        index: Tensor | None,
        background_rows: int,
        needs: Sequence[bool],
        strides: tuple[int, ...] | None = None,
    ) -> Gradients:
        """Gradients of foreground, background and alpha where ``needs`` asks for them, in the layout of the result."""
        shape = grad.shape
        rows = shape[0]
        # The batch stride of a result of one sample can be anything; rows of the background's gradient must follow each
        # other.
        strides = output_strides(shape, grad.stride() if strides is None else strides)
        grad = in_layout(grad, strides)
        own: Tensor | None = None
        other: Tensor | None = None
        per_sample: Tensor | None = None
        if needs[0]:
            own = self._fresh(torch.empty_strided(shape, strides, dtype=grad.dtype, device=grad.device))
        if needs[1]:
            other_shape = (background_rows, *shape[1:])
            other = self._fresh(torch.empty_strided(other_shape, strides, dtype=grad.dtype, device=grad.device))
        if needs[2]:
            assert foreground is not None
            assert background is not None
            foreground, background = in_layout(foreground, strides), in_layout(background, strides)
            per_sample = torch.empty(rows, dtype=torch.float64, device=grad.device)
        alpha64, index = _small(alpha), None if index is None else index.contiguous()
        self._backward(
            DTYPES[grad.dtype],
            rows,
            background_rows,
            math.prod(shape[1:]),
            grad.data_ptr(),
            grad.stride(0),
            address(foreground, "foreground"),
            0 if foreground is None else foreground.stride(0),
            address(background, "background"),
            0 if background is None else background.stride(0),
            address(index, "index"),
            address(alpha64, "alpha"),
            0 if alpha64 is None else alpha64.stride(0),
            value,
            address(own),
            address(other),
            address(per_sample),
            grad,
            index,
        )
        if per_sample is not None and alpha is not None:
            per_sample = per_sample.to(alpha.dtype)
        return own, other, per_sample

    def _fresh(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def _forward(self, *arguments: Any) -> None:
        raise NotImplementedError

    def _backward(self, *arguments: Any) -> None:
        raise NotImplementedError


class CpuBlend(Launcher):
    """Launcher of the CPU core, with a short path for the most common tensors.

    On small feature vectors the way into the core takes longer than the blend.
    """

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        self.fits = core.blend_fits
        self._forward_of, self._backward_of = core.blend_forward_of, core.blend_backward_of

    def forward(
        self, foreground: Tensor, background: Tensor, alpha: Tensor | None, value: float, index: Tensor | None
    ) -> Tensor:
        out = _empty_like(foreground)
        count = out.numel()
        if count >= _LARGE:
            fresh(self.core, out)
        weights = alpha if alpha is None or alpha.dtype in _WIDE else alpha.double()
        if count and self._forward_of(foreground, background, weights, value, index, out, _threads()):
            return out
        del out  # its memory can be used again
        return super().forward(foreground, background, alpha, value, index)

    def backward(
        self,
        grad: Tensor,
        foreground: Tensor | None,
        background: Tensor | None,
        alpha: Tensor | None,
        value: float,
        index: Tensor | None,
        background_rows: int,
        needs: Sequence[bool],
        strides: tuple[int, ...] | None = None,
    ) -> Gradients:
        count = grad.numel()
        if not count or grad.stride() != strides or not grad.is_contiguous():
            rest = (foreground, background, alpha, value, index, background_rows, needs, strides)
            return super().backward(grad, *rest)
        own = _empty_like(grad) if needs[0] else None
        other = per_sample = None
        if needs[1]:
            same = len(grad) == background_rows
            other = _empty_like(grad) if same else grad.new_empty((background_rows, *grad.shape[1:]))
        if count >= _LARGE:
            for gradient in (own, other):
                if gradient is not None:
                    fresh(self.core, gradient)
        if needs[2]:
            per_sample = torch.empty(len(grad), dtype=torch.float64)
        weights = alpha if alpha is None or alpha.dtype in _WIDE else alpha.double()
        maps = (foreground, background) if needs[2] else (None, None)
        if not self._backward_of(
            grad, *maps, weights, value, index, background_rows, own, other, per_sample, _threads()
        ):
            del own, other
            rest = (foreground, background, alpha, value, index, background_rows, needs, strides)
            return super().backward(grad, *rest)
        if per_sample is not None and alpha is not None:
            per_sample = per_sample.to(alpha.dtype)
        return own, other, per_sample

    def _fresh(self, tensor: Tensor) -> Tensor:
        return fresh(self.core, tensor)

    # The arguments of the GPU core, and the dtype of alpha, which _small has converted to float64.
    def _forward(self, *arguments: Any) -> None:
        self.core.blend_forward(*arguments[:10], _FLOAT64, *arguments[10:-1], torch.get_num_threads())

    def _backward(self, *arguments: Any) -> None:
        self.core.blend_backward(*arguments[:12], _FLOAT64, *arguments[12:-2], torch.get_num_threads())


# Dtypes in which the CPU core reads alpha.
_WIDE = (torch.float32, torch.float64)
_FLOAT64 = DTYPES[torch.float64]
_LARGE = HUGE // 8  # elements; fresh() compares bytes


def _small(alpha: Tensor | None) -> Tensor | None:
    return None if alpha is None else alpha.detach().to(torch.float64)


_empty_like, _threads = torch.empty_like, torch.get_num_threads
