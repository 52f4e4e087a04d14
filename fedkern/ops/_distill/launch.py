"""Launcher of the distill family on the CPU core: allocates outputs and calls the core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import DTYPES, address
from fedkern.ops._core.memory import HUGE, fresh
from fedkern.ops._distill.arguments import CONSENSUS, ENTROPY, JS, KL, LIMIT, weight_gradient
from fedkern.ops._distill.common import BATCHMEAN, NONE, mean_scale, row_shape
from fedkern.ops._distill.kernels import Divergence, Ensemble
from fedkern.ops._distill.reference import compute_dtype, result_dtype

# Looked up once: at 64 rows the code around a loss takes longer than the loss.
_empty_like = torch.empty_like
_threads = torch.get_num_threads

# Templates for empty_like, which takes two thirds of the time of empty(()).
_SCALARS = {dtype: torch.empty((), dtype=dtype) for dtype in DTYPES}

_LARGE = HUGE // 8  # elements; fresh() compares bytes


def _empty_result(rows_of: Tensor, dtype: torch.dtype, reduction: int) -> Tensor:
    return torch.empty(row_shape(rows_of), dtype=dtype) if reduction == NONE else _empty_like(_SCALARS[dtype])


class CpuDistill:
    """:class:`fedkern.ops._distill.kernels.DistillKernel` on ``fedkern._cpu``."""

    # A row's gradient costs little while the row is in the cache, and the host can read grad_output.
    fused = True
    # The core reads weights [K] for every row through a stride of 0.
    short_weights = True

    def __init__(self, core: Any) -> None:
        self.core = core
        self._distill = core.distill
        self._distill_ensemble = core.distill_ensemble

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
        self._distill(
            LIMIT if settings.temperature == math.inf else KL,
            1 if dtype is torch.float64 else 0,
            student,
            settings.temperature,
            settings.reverse,
            None if reduction == BATCHMEAN else 1.0,
            _threads(),
            1 if other is None else 2,
            teacher,
            student,
            other,
            to_teacher,
            to_student,
            to_other,
            weight,
            None,
            result if reduction == NONE else None,
            (raw_loss, None if reduction == NONE else result),
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
            student,
            settings.temperature,
            settings.reverse,
            None if settings.reduction == BATCHMEAN else 1.0,
            _threads(),
            1 if other is None else 2,
            teacher,
            student,
            other,
            to_teacher,
            to_student,
            to_other,
            weight,
            grad,
            None,
            (raw, None),
        )
        return (
            to_student,
            to_other,
            to_teacher,
            weight_gradient(raw, grad, mean_scale(student, settings.reduction), weight),
        )

    def entropy_forward(self, logits: Tensor, reduction: int, to_logits: Tensor | None = None) -> Tensor:
        result = _empty_result(logits, logits.dtype, reduction)
        self._entropy(logits, reduction, to_logits, None, *((result, None) if reduction == NONE else (None, result)))
        return result

    def entropy_backward(self, grad: Tensor, logits: Tensor, reduction: int) -> Tensor:
        gradient = self.empty_gradient(logits)
        grad = grad.resolve_neg()
        self._entropy(logits, reduction, gradient, grad, None, None)
        return gradient

    def _entropy(
        self, logits: Tensor, reduction: int, gradient: Tensor | None, grad: Any, row_loss: Any, total: Any
    ) -> None:
        self._distill(
            ENTROPY,
            1 if logits.dtype is torch.float64 else 0,
            logits,
            1.0,
            False,
            None if reduction == BATCHMEAN else 1.0,
            _threads(),
            0,
            logits,
            None,
            None,
            gradient,
            None,
            None,
            None,
            grad,
            row_loss,
            (None, total),
        )

    # --- stacks of teachers

    def ensemble_forward(
        self,
        student: Tensor,
        teachers: Tensor,
        weights: Tensor | None,
        class_mask: Tensor | None,
        settings: Ensemble,
        to_student: Tensor | None = None,
        to_teachers: Tensor | None = None,
    ) -> Tensor:
        dtype = result_dtype(student, None, teachers)
        temperature, reduction = settings.temperature, settings.reduction
        result = _empty_result(student, dtype, reduction)
        self._distill_ensemble(
            settings.mix,
            temperature == math.inf,
            settings.log_probs and temperature == 1.0,
            class_mask is not None or (weights is not None and _by_class(weights)),
            1 if dtype is torch.float64 else 0,
            teachers,
            temperature,
            None if reduction == BATCHMEAN else 1.0,
            _threads(),
            student,
            teachers,
            weights,
            None if class_mask is None else (address(class_mask, "class_mask"), class_mask.stride()),
            to_student,
            to_teachers,
            None,
            None,
            None,
            (reduction == NONE, result, None),
        )
        return result

    def ensemble_backward(
        self,
        grad: Tensor,
        student: Tensor,
        teachers: Tensor,
        weights: Tensor | None,
        class_mask: Tensor | None,
        settings: Ensemble,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dtype = result_dtype(student, None, teachers)
        temperature, reduction = settings.temperature, settings.reduction
        by_class = class_mask is not None or (weights is not None and _by_class(weights))
        grad = grad.resolve_neg()  # bound to a name: its memory must outlive this line
        to_student = self.empty_gradient(student) if needs[0] else None
        to_teachers = self.empty_gradient(teachers) if needs[1] else None
        to_weights = None
        if needs[2] and weights is not None:
            # One gradient per class also where only the mask differs by class: the kernel then works by class.
            shape = (*weights.shape[:2], teachers.shape[2], *weights.shape[3:]) if by_class else weights.shape
            to_weights = torch.empty(shape, dtype=compute_dtype(dtype))
        self._distill_ensemble(
            settings.mix,
            temperature == math.inf,
            settings.log_probs and temperature == 1.0,
            by_class,
            1 if dtype is torch.float64 else 0,
            teachers,
            temperature,
            None if reduction == BATCHMEAN else 1.0,
            _threads(),
            student,
            teachers,
            weights,
            None if class_mask is None else (address(class_mask, "class_mask"), class_mask.stride()),
            to_student,
            to_teachers,
            to_weights,
            grad,
            None,
            (False, None, None),
        )
        if to_weights is not None and weights is not None:
            if to_weights.shape != weights.shape:
                to_weights = to_weights.sum(2, keepdim=True)
            to_weights = to_weights.to(weights.dtype)
        return to_student, to_teachers, to_weights

    def js_forward(
        self, logits: Tensor, weights: Tensor | None, reduction: int, to_logits: Tensor | None = None
    ) -> Tensor:
        result = _empty_stack_result(logits, reduction)
        self._run_stack(JS, logits, weights, reduction, to_logits, None, (), result, None)
        return result

    def js_backward(
        self, grad: Tensor, logits: Tensor, weights: Tensor | None, reduction: int, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        return self._stack_backward(JS, (grad,), logits, weights, reduction, needs)

    def consensus_kept(self, logits: Tensor) -> Tensor | None:
        # Per row: four numbers for each of the K, then the log of the mixture. The last layout has rows side by side,
        # where the core takes them side by side.
        count, batch, classes, *positions = logits.shape
        numbers, dtype = 4 * count + classes, compute_dtype(logits.dtype)
        if 2 * numbers > count * classes:  # not much less to read than the logits
            return None
        if classes >= 24 and not positions:
            return torch.empty((batch, numbers), dtype=dtype)
        return torch.empty((numbers, batch, *positions), dtype=dtype).transpose(0, 1)

    def consensus_forward(
        self, logits: Tensor, weights: Tensor | None, reduction: int, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        first, second = _empty_stack_result(logits, reduction), _empty_stack_result(logits, reduction)
        self._run_stack(CONSENSUS, logits, weights, reduction, None, None, (), first, second, kept)
        return first, second

    def consensus_backward(
        self,
        grad_mixture: Tensor,
        grad_mean: Tensor,
        logits: Tensor,
        weights: Tensor | None,
        reduction: int,
        needs: Sequence[bool],
        kept: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        return self._stack_backward(CONSENSUS, (grad_mixture, grad_mean), logits, weights, reduction, needs, kept)

    def _stack_backward(
        self,
        kind: int,
        grads: tuple[Tensor, ...],
        logits: Tensor,
        weights: Tensor | None,
        reduction: int,
        needs: Sequence[bool],
        kept: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        to_logits = self.empty_gradient(logits) if needs[0] else None
        to_weights = None
        if needs[1] and weights is not None:
            to_weights = torch.empty(weights.shape, dtype=compute_dtype(logits.dtype))
        grads = tuple([grad.resolve_neg() for grad in grads])
        self._run_stack(kind, logits, weights, reduction, to_logits, to_weights, grads, None, None, kept)
        return to_logits, to_weights if weights is None or to_weights is None else to_weights.to(weights.dtype)

    def _run_stack(
        self,
        kind: int,
        logits: Tensor,
        weights: Tensor | None,
        reduction: int,
        to_logits: Tensor | None,
        to_weights: Tensor | None,
        grads: tuple[Tensor, ...],
        first: Any,
        second: Any,
        kept: Tensor | None = None,
    ) -> None:
        self._distill_ensemble(
            kind,
            False,
            False,
            False,
            1 if logits.dtype is torch.float64 else 0,
            logits,
            1.0,
            None if reduction == BATCHMEAN else 1.0,
            _threads(),
            None,
            logits,
            weights,
            None,
            None,
            to_logits,
            to_weights,
            grads[0] if grads else None,
            grads[1] if len(grads) > 1 else None,
            (reduction == NONE, first, second, kept),
        )


def _empty_stack_result(logits: Tensor, reduction: int) -> Tensor:
    dtype = logits.dtype
    if reduction != NONE:
        return _empty_like(_SCALARS[dtype])
    return torch.empty(logits.shape[1:2] + logits.shape[3:], dtype=dtype)


def _by_class(weights: Tensor) -> bool:
    return weights.dim() > 1 and weights.shape[2] > 1
