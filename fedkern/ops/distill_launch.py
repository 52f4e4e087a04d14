"""The distill family on the CPU core: outputs are allocated here, tensors become pointers and strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._memory import HUGE, fresh
from fedkern.ops.backend import DTYPES, Kernel, cpu_core, register, register_triton
from fedkern.ops.distill_common import BATCHMEAN, NONE, mean_scale, row_shape
from fedkern.ops.distill_kernels import ALL_DTYPES, Divergence
from fedkern.ops.distill_reference import compute_dtype, result_dtype

# csrc/include/fedkern/distill.h
KL, LIMIT, ENTROPY = 0, 1, 2

# Looked up once: at 64 rows what is around a loss takes longer than the loss.
_empty_like = torch.empty_like
_threads = torch.get_num_threads

# Copied by empty_like, which takes two thirds of the time of empty(()).
_SCALARS = {dtype: torch.empty((), dtype=dtype) for dtype in DTYPES}

_LARGE = HUGE // 8  # elements; fresh() looks at the bytes


def _argument(x: Tensor | None) -> tuple[int, int, tuple[int, ...]] | None:
    """A tensor as the core takes it: pointer, dtype, strides."""
    return None if x is None else (x.data_ptr(), DTYPES[x.dtype], x.stride())


def _empty_result(rows_of: Tensor, dtype: torch.dtype, reduction: int) -> Tensor:
    return torch.empty(row_shape(rows_of), dtype=dtype) if reduction == NONE else _empty_like(_SCALARS[dtype])


def weight_gradient(raw: Tensor | None, grad: Tensor, scale: float, weight: Tensor | None) -> Tensor | None:
    """From unweighted row losses the gradient of their weights."""
    return None if raw is None or weight is None else (raw * grad.to(raw.dtype) * scale).to(weight.dtype)


class CpuDistill:
    """:class:`fedkern.ops.distill_kernels.DistillKernel` on ``fedkern._cpu``."""

    # A row's gradient costs little while the row is in the cache, and grad_output can be looked at.
    fused = True

    def __init__(self, core: Any) -> None:
        self.core = core
        self._distill = core.distill

    def scaled(self, gradients: tuple[Tensor | None, ...], grad: Tensor) -> tuple[Tensor | None, ...] | None:
        factor = grad.item()
        if factor == 1.0:
            return gradients
        for x in gradients:
            if x is not None and x.element_size() == 2:
                return None
        return tuple([x if x is None else x * factor for x in gradients])

    def empty_gradient(self, x: Tensor) -> Tensor:
        gradient = _empty_like(x)
        return gradient if gradient.numel() < _LARGE else fresh(self.core, gradient)

    def divergence_forward(
        self,
        student: Tensor,
        other: Tensor | None,
        teacher: Tensor,
        weight: Tensor | None,
        settings: Divergence,
        to_student: Tensor | None = None,
        to_other: Tensor | None = None,
        to_teacher: Tensor | None = None,
        raw_loss: Tensor | None = None,
    ) -> Tensor:
        reduction = settings.reduction
        dtype = result_dtype(student, other, teacher)
        result = _empty_result(student, dtype, reduction)
        out = (result.data_ptr(), DTYPES[dtype], result.stride() if reduction == NONE else ())
        self._distill(
            LIMIT if settings.temperature == math.inf else KL,
            1 if dtype is torch.float64 else 0,
            student.shape,
            settings.temperature,
            settings.reverse,
            None if reduction == BATCHMEAN else 1.0,
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
        self,
        grad: Tensor,
        student: Tensor,
        other: Tensor | None,
        teacher: Tensor,
        weight: Tensor | None,
        settings: Divergence,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        to_student, to_other, to_teacher = (
            self.empty_gradient(x) if need and x is not None else None
            for x, need in zip((student, other, teacher), needs[:3], strict=True)
        )
        compute = compute_dtype(result_dtype(student, other, teacher))
        raw = torch.empty(row_shape(student), dtype=compute) if needs[3] else None
        grad = grad.resolve_neg()
        self._distill(
            LIMIT if settings.temperature == math.inf else KL,
            DTYPES[compute],
            student.shape,
            settings.temperature,
            settings.reverse,
            None if settings.reduction == BATCHMEAN else 1.0,
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
        return (
            to_student,
            to_other,
            to_teacher,
            weight_gradient(raw, grad, mean_scale(student, settings.reduction), weight),
        )

    def entropy_forward(self, logits: Tensor, reduction: int, to_logits: Tensor | None = None) -> Tensor:
        result = _empty_result(logits, logits.dtype, reduction)
        out = _argument(result)
        self._entropy(logits, reduction, to_logits, None, *((out, None) if reduction == NONE else (None, out)))
        return result

    def entropy_backward(self, grad: Tensor, logits: Tensor, reduction: int) -> Tensor:
        gradient = self.empty_gradient(logits)
        grad = grad.resolve_neg()
        self._entropy(logits, reduction, gradient, _argument(grad), None, None)
        return gradient

    def _entropy(
        self, logits: Tensor, reduction: int, gradient: Tensor | None, grad: Any, row_loss: Any, total: Any
    ) -> None:
        self._distill(
            ENTROPY,
            1 if logits.dtype is torch.float64 else 0,
            logits.shape,
            1.0,
            False,
            None if reduction == BATCHMEAN else 1.0,
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


for _name in ("kl_div", "dual_kl", "entropy"):
    register(_name, "cpu", Kernel(load=lambda: CpuDistill(cpu_core()), dtypes=ALL_DTYPES, devices=frozenset({"cpu"})))
    register_triton(_name, "distill", "TritonDistill", ALL_DTYPES)
