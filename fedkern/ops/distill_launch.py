"""How the distill operators reach the CPU core: outputs are allocated here, tensors become pointers and strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fedkern.ops import backend
from fedkern.ops._memory import HUGE, fresh
from fedkern.ops.backend import DTYPES, Kernel, cpu_core, register
from fedkern.ops.distill_common import BATCHMEAN, MAX_DIMS, NONE, row_shape
from fedkern.ops.distill_reference import compute_dtype, result_dtype

# csrc/include/fedkern/distill.h
KL, LIMIT, ENTROPY = 0, 1, 2


class Core:
    """The CPU core's entry point; what :func:`fedkern.ops.backend.select` hands out."""

    def __init__(self, module: ModuleType) -> None:
        self.distill = module.distill
        self.advise_huge_pages = module.advise_huge_pages


for _name in ("kl_div", "dual_kl", "entropy"):
    register(_name, "cpu", Kernel(load=lambda: Core(cpu_core()), dtypes=frozenset(DTYPES), devices=frozenset({"cpu"})))


STRIDED = torch.strided

# Looked up once: at 64 rows the tests around a loss take longer than the loss.
_is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_empty_like = torch.empty_like
_threads = torch.get_num_threads


def plain(tensors: tuple[Tensor, ...]) -> bool:
    """True when ``tensors`` are logits of one shape that the core can read: the common case, in few steps.

    False says nothing yet: they may be wrong, or right but for another path.
    """
    if _is_compiling() or _functorch_active() or _dispatch_modes() or _function_modes():
        return False
    shape = None
    for x in tensors:
        kind = type(x)
        if kind is not Tensor and kind is not Parameter:
            return False
        if shape is None:
            shape = x.shape
        elif x.shape != shape:
            return False
        if x.dtype not in DTYPES or not x.is_cpu or x.layout is not STRIDED or x.is_neg():
            return False
    return shape is not None and 2 <= len(shape) <= MAX_DIMS and shape[1] != 0


def cpu_kernel(operator: str, tensors: tuple[Tensor, ...]) -> Core | None:
    """What serves ``operator`` for plain CPU ``tensors``; None for the reference."""
    found = backend._chosen.get((operator, "cpu"))
    return backend.select(operator, *tensors) if found is None else found[0]


def _argument(x: Tensor | None) -> tuple[int, int, tuple[int, ...]] | None:
    """A tensor as the core takes it: pointer, dtype, strides."""
    return None if x is None else (x.data_ptr(), DTYPES[x.dtype], x.stride())


# Copied by empty_like, which takes two thirds of the time of empty(()).
_SCALARS = {dtype: torch.empty((), dtype=dtype) for dtype in DTYPES}


def _empty_result(rows_of: Tensor, dtype: torch.dtype, reduction: int) -> Tensor:
    return torch.empty(row_shape(rows_of), dtype=dtype) if reduction == NONE else _empty_like(_SCALARS[dtype])


def gradient_like(core: Core, x: Tensor) -> Tensor:
    """An empty gradient of ``x`` in its memory format."""
    gradient = _empty_like(x)
    return gradient if gradient.numel() < _LARGE else fresh(core, gradient)


_LARGE = HUGE // 8  # elements; fresh() looks at the bytes


def mean_scale(logits: Tensor, reduction: int) -> float:
    """What the sum over rows is multiplied by."""
    if reduction != BATCHMEAN:
        return 1.0
    count = logits.numel()
    return logits.shape[1] / count if count else 1.0


def divergence_forward(
    core: Core,
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: int,
    to_student: Tensor | None = None,
    to_other: Tensor | None = None,
    to_teacher: Tensor | None = None,
    raw_loss: Tensor | None = None,
) -> Tensor:
    """The loss; on the way the gradients for a grad_output of 1 into ``to_...``."""
    dtype = result_dtype(student, other, teacher)
    result = _empty_result(student, dtype, reduction)
    out = (result.data_ptr(), DTYPES[dtype], result.stride())
    core.distill(
        LIMIT if temperature == math.inf else KL,
        1 if dtype is torch.float64 else 0,
        student.shape,
        temperature,
        reverse,
        mean_scale(student, reduction),
        _threads(),
        1 if other is None else 2,
        (teacher.data_ptr(), DTYPES[teacher.dtype], teacher.stride()),
        (student.data_ptr(), DTYPES[student.dtype], student.stride()),
        None if other is None else _argument(other),
        None if to_teacher is None else _argument(to_teacher),
        None if to_student is None else (to_student.data_ptr(), DTYPES[to_student.dtype], to_student.stride()),
        None if to_other is None else _argument(to_other),
        None if weight is None else _argument(weight),
        None,
        out if reduction == NONE else None,
        (_argument(raw_loss), None if reduction == NONE else out),
    )
    return result


def divergence_backward(
    core: Any,
    grad: Tensor,
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of student, other, teacher and weight (None where not needed), recomputed from the logits."""
    to_student, to_other, to_teacher = (
        gradient_like(core, x) if need and x is not None else None
        for x, need in zip((student, other, teacher), needs[:3], strict=True)
    )
    compute = compute_dtype(result_dtype(student, other, teacher))
    raw = torch.empty(row_shape(student), dtype=compute) if needs[3] else None
    scale = mean_scale(student, reduction)
    grad = grad.resolve_neg()
    core.distill(
        LIMIT if temperature == math.inf else KL,
        DTYPES[compute],
        student.shape,
        temperature,
        reverse,
        scale,
        _threads(),
        1 if other is None else 2,
        _argument(teacher),
        _argument(student),
        _argument(other),
        _argument(to_teacher),
        _argument(to_student),
        _argument(to_other),
        _argument(weight),
        _argument(grad),
        None,
        (_argument(raw), None),
    )
    return to_student, to_other, to_teacher, weight_gradient(raw, grad, scale, weight)


def weight_gradient(raw: Tensor | None, grad: Tensor, scale: float, weight: Tensor | None) -> Tensor | None:
    return None if raw is None or weight is None else (raw * grad.to(raw.dtype) * scale).to(weight.dtype)


def entropy_forward(core: Core, logits: Tensor, reduction: int, gradient: Tensor | None = None) -> Tensor:
    """The entropy; on the way its gradient for a grad_output of 1 into ``gradient``."""
    result = _empty_result(logits, logits.dtype, reduction)
    out = _argument(result)
    _run_entropy(core, logits, reduction, gradient, None, *((out, None) if reduction == NONE else (None, out)))
    return result


def entropy_backward(core: Core, grad: Tensor, logits: Tensor, reduction: int) -> Tensor:
    """The gradient, recomputed from the logits."""
    gradient = gradient_like(core, logits)
    grad = grad.resolve_neg()
    _run_entropy(core, logits, reduction, gradient, _argument(grad), None, None)
    return gradient


def _run_entropy(
    core: Core, logits: Tensor, reduction: int, gradient: Tensor | None, grad: Any, row_loss: Any, total: Any
) -> None:
    core.distill(
        ENTROPY,
        1 if logits.dtype is torch.float64 else 0,
        logits.shape,
        1.0,
        False,
        mean_scale(logits, reduction),
        _threads(),
        0,
        _argument(logits),
        None,
        None,
        _argument(gradient),
        None,
        None,
        None,
        grad,
        row_loss,
        (None, total),
    )
