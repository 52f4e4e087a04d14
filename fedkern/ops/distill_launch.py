"""How the distill operators reach the CPU core: outputs are allocated here, tensors become pointers and strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedkern.ops.backend import DTYPES, Kernel, cpu_core, register
from fedkern.ops.distill_common import BATCHMEAN, NONE, row_count, row_shape
from fedkern.ops.distill_reference import compute_dtype, result_dtype

# csrc/include/fedkern/distill.h
KL, LIMIT, ENTROPY = 0, 1, 2


class Core:
    """The CPU core's entry point; what :func:`fedkern.ops.backend.select` hands out."""

    def __init__(self, module: ModuleType) -> None:
        self.distill = module.distill


for _name in ("kl_div", "dual_kl", "entropy"):
    register(_name, "cpu", Kernel(load=lambda: Core(cpu_core()), dtypes=frozenset(DTYPES), devices=frozenset({"cpu"})))


def logits_argument(x: Tensor | None) -> tuple[int, int, tuple[int, ...]] | None:
    """A tensor as the core takes it: pointer, dtype, strides."""
    return None if x is None else (x.data_ptr(), DTYPES[x.dtype], x.stride())


def call_core(
    core: Core,
    kind: int,
    compute: int,
    shape: torch.Size,
    temperature: float,
    reverse: bool,
    scale: float,
    teacher: Tensor,
    students: tuple[Tensor | None, Tensor | None],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    weight: Tensor | None = None,
    grad_output: Tensor | None = None,
    row_loss: Tensor | None = None,
    raw_loss: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Runs the kernel; ``gradients`` are those of the teacher and of both students."""
    a, b = students
    core.distill(
        kind,
        compute,
        shape,
        temperature,
        reverse,
        scale,
        torch.get_num_threads(),
        (a is not None) + (b is not None),
        logits_argument(teacher),
        logits_argument(a),
        logits_argument(b),
        logits_argument(gradients[0]),
        logits_argument(gradients[1]),
        logits_argument(gradients[2]),
        logits_argument(weight),
        logits_argument(grad_output),
        logits_argument(row_loss),
        (logits_argument(raw_loss), logits_argument(total)),
    )


def divergence_forward(
    core: Any,
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: int,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    raw_loss: Tensor | None = None,
) -> Tensor:
    """The loss; on the way the gradients for a grad_output of 1 into ``gradients`` (teacher, student, other)."""
    dtype = result_dtype(student, other, teacher)
    shape = student.shape
    row_loss = total = None
    if reduction == NONE:
        result = row_loss = torch.empty(row_shape(student), dtype=dtype)
    else:
        result = total = torch.empty((), dtype=dtype)
    call_core(
        core,
        LIMIT if temperature == math.inf else KL,
        1 if dtype is torch.float64 else 0,
        shape,
        temperature,
        reverse,
        1.0 / max(row_count(student), 1) if reduction == BATCHMEAN else 1.0,
        teacher,
        (student, other),
        gradients,
        weight,
        row_loss=row_loss,
        raw_loss=raw_loss,
        total=total,
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
        torch.empty_like(x) if need and x is not None else None
        for x, need in zip((student, other, teacher), needs[:3], strict=True)
    )
    compute = compute_dtype(result_dtype(student, other, teacher))
    raw = torch.empty(row_shape(student), dtype=compute) if needs[3] else None
    scale = 1.0 / max(row_count(student), 1) if reduction == BATCHMEAN else 1.0
    call_core(
        core,
        LIMIT if temperature == math.inf else KL,
        DTYPES[compute],
        student.shape,
        temperature,
        reverse,
        scale,
        teacher,
        (student, other),
        (to_teacher, to_student, to_other),
        weight,
        grad_output=grad.resolve_neg(),
        raw_loss=raw,
    )
    return to_student, to_other, to_teacher, weight_gradient(raw, grad, scale, weight)


def weight_gradient(raw: Tensor | None, grad: Tensor, scale: float, weight: Tensor | None) -> Tensor | None:
    return None if raw is None or weight is None else (raw * (grad * scale)).to(weight.dtype)


def entropy_forward(core: Core, logits: Tensor, reduction: int, gradient: Tensor | None = None) -> Tensor:
    """The entropy; on the way its gradient for a grad_output of 1 into ``gradient``."""
    row_loss = total = None
    if reduction == NONE:
        result = row_loss = torch.empty(row_shape(logits), dtype=logits.dtype)
    else:
        result = total = torch.empty((), dtype=logits.dtype)
    call_core(
        core,
        ENTROPY,
        DTYPES[compute_dtype(logits.dtype)],
        logits.shape,
        1.0,
        False,
        1.0 / max(row_count(logits), 1) if reduction == BATCHMEAN else 1.0,
        logits,
        (None, None),
        (gradient, None, None),
        row_loss=row_loss,
        total=total,
    )
    return result


def entropy_backward(core: Core, grad: Tensor, logits: Tensor, reduction: int) -> Tensor:
    """The gradient, recomputed from the logits."""
    gradient = torch.empty_like(logits)
    call_core(
        core,
        ENTROPY,
        DTYPES[compute_dtype(logits.dtype)],
        logits.shape,
        1.0,
        False,
        1.0 / max(row_count(logits), 1) if reduction == BATCHMEAN else 1.0,
        logits,
        (None, None),
        (gradient, None, None),
        grad_output=grad.resolve_neg(),
    )
    return gradient
