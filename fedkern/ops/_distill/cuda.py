"""The distill family on CUDA: backward passes recompute gradients from the logits and grad_output, on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import address
from fedkern.ops._core.cuda import queue
from fedkern.ops._distill.arguments import ENTROPY, KL, LIMIT, argument, weight_gradient
from fedkern.ops._distill.common import BATCHMEAN, NONE, mean_scale, row_shape
from fedkern.ops._distill.cuda_ensemble import CudaEnsembles
from fedkern.ops._distill.kernels import Divergence, Recomputes
from fedkern.ops._distill.reference import compute_dtype, result_dtype

# Most rows and classes of a call that one block computes alone, without a workspace.
_ROWS, _CLASSES = 64, 1024

_empty = torch.empty


class CudaDistill(Recomputes, CudaEnsembles):
    """:class:`fedkern.ops._distill.kernels.DistillKernel` on ``fedkern._cuda``."""

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        self._distill = core.distill
        self._workspace = core.distill_workspace

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
        result = _empty(row_shape(student) if reduction == NONE else (), dtype=dtype, device=student.device)
        self._divergence(
            student, other, teacher, weight, settings, (to_teacher, to_student, to_other), None, result, raw_loss, dtype
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
            torch.empty_like(x) if need and x is not None else None
            for x, need in zip((student, other, teacher), needs[:3], strict=True)
        )
        compute = compute_dtype(result_dtype(student, other, teacher))
        raw = _empty(row_shape(student), dtype=compute, device=student.device) if needs[3] else None
        grad = grad.resolve_neg()
        gradients = (to_teacher, to_student, to_other)
        self._divergence(student, other, teacher, weight, settings, gradients, grad, None, raw, compute)
        to_weight = weight_gradient(raw, grad, mean_scale(student, settings.reduction), weight)
        return to_student, to_other, to_teacher, to_weight

    def entropy_forward(self, logits: Tensor, reduction: int, to_logits: Tensor | None = None) -> Tensor:
        result = _empty(row_shape(logits) if reduction == NONE else (), dtype=logits.dtype, device=logits.device)
        self._entropy(logits, reduction, to_logits, None, result)
        return result

    def entropy_backward(self, grad: Tensor, logits: Tensor, reduction: int) -> Tensor:
        gradient = torch.empty_like(logits)
        self._entropy(logits, reduction, gradient, grad.resolve_neg(), None)
        return gradient

    def _divergence(
        self,
        student: Tensor,
        other: Tensor | None,
        teacher: Tensor,
        weight: Tensor | None,
        settings: Divergence,
        gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
        grad: Tensor | None,
        result: Tensor | None,
        raw_loss: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        temperature, rows = settings.temperature, settings.reduction == NONE
        to_teacher, to_student, to_other = gradients
        out = argument(result)
        workspace = self._space(student)
        self._distill(
            LIMIT if temperature == math.inf else KL,
            1 if dtype is torch.float64 else 0,
            student.shape,
            temperature,
            settings.reverse,
            None if settings.reduction == BATCHMEAN else 1.0,
            1,
            1 if other is None else 2,
            argument(teacher),
            argument(student),
            argument(other),
            argument(to_teacher),
            argument(to_student),
            argument(to_other),
            argument(weight),
            argument(grad),
            out if rows else None,
            (argument(raw_loss), None if rows else out),
            address(workspace),
            *queue(student),
        )

    def _entropy(
        self, logits: Tensor, reduction: int, gradient: Tensor | None, grad: Tensor | None, result: Tensor | None
    ) -> None:
        out = argument(result)
        workspace = self._space(logits)
        self._distill(
            ENTROPY,
            1 if logits.dtype is torch.float64 else 0,
            logits.shape,
            1.0,
            False,
            None if reduction == BATCHMEAN else 1.0,
            1,
            0,
            argument(logits),
            None,
            None,
            argument(gradient),
            None,
            None,
            None,
            argument(grad),
            out if reduction == NONE else None,
            (None, None if reduction == NONE else out),
            address(workspace),
            *queue(logits),
        )

    def _space(self, logits: Tensor) -> Tensor | None:
        """Memory for sums between blocks; None where one block computes the call alone."""
        classes = logits.shape[1]
        if classes <= _CLASSES and logits.numel() <= _ROWS * classes:
            return None
        return _empty(self._workspace, dtype=torch.float64, device=logits.device)
