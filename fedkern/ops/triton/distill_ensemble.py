"""ensemble_kl, js_div and consensus in Triton: from tensors to launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops import backend
from fedkern.ops.distill_common import BATCHMEAN, LOGITS, MEAN, NONE, row_count, row_shape
from fedkern.ops.distill_ensemble_reference import ensemble_reference
from fedkern.ops.distill_kernels import Ensemble
from fedkern.ops.distill_library import reference_gradients
from fedkern.ops.distill_reference import compute_dtype, result_dtype
from fedkern.ops.triton.distill_members import stack_kernel
from fedkern.ops.triton.distill_mixture import members_kernel, mixture_kernel
from fedkern.ops.triton.launch import double_bits, launch
from fedkern.ops.triton.rows import (
    COMPUTE,
    SERIES,
    Rows,
    Steps,
    finish,
    hand_over,
    readable,
    row_steps_of,
    share,
    steps_of,
    writable,
)

_NONE = Steps(0, 0, 0)

# Two elements of a tile to a thread: these kernels hold several tiles at once, and would spill with more.
WARPS = 8


class Mixtures:
    """The part of :class:`fedkern.ops.distill_kernels.DistillKernel` with K teachers."""

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
        if _is_rare(settings):
            return _reference(student, teachers, weights, class_mask, settings)
        result = _empty(student, dtype, settings.reduction)
        _ensemble(None, student, teachers, weights, class_mask, settings, (to_student, to_teachers, None), result)
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
        if _is_rare(settings):
            return _reference_gradients(grad, student, teachers, weights, class_mask, settings, needs)
        to_student = torch.empty_like(student) if needs[0] else None
        to_teachers = torch.empty_like(teachers) if needs[1] else None
        to_weights = None
        if needs[2] and weights is not None:
            # By class also where the mask alone makes it so.
            by_class = class_mask is not None or weights.shape[2] > 1
            shape = (*weights.shape[:2], teachers.shape[2] if by_class else 1, *teachers.shape[3:])
            compute = compute_dtype(result_dtype(student, None, teachers))
            to_weights = torch.empty(shape, dtype=compute, device=student.device)
        gradients = (to_student, to_teachers, to_weights)
        _ensemble(grad.resolve_neg(), student, teachers, weights, class_mask, settings, gradients, None)
        if to_weights is not None and weights is not None:
            axes = [a for a in range(2, weights.dim()) if weights.shape[a] == 1 and to_weights.shape[a] > 1]
            to_weights = (to_weights.sum(axes, keepdim=True) if axes else to_weights).to(weights.dtype)
        return to_student, to_teachers, to_weights

    def js_forward(
        self, logits: Tensor, weights: Tensor | None, reduction: int, to_logits: Tensor | None = None
    ) -> Tensor:
        result = _empty(logits[0], logits.dtype, reduction)
        _stack(None, None, None, logits, weights, reduction, (None, to_logits, None), (result, None))
        return result

    def js_backward(
        self, grad: Tensor, logits: Tensor, weights: Tensor | None, reduction: int, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        return _stack_backward((grad, None), logits, weights, reduction, needs, False)

    def consensus_forward(
        self, logits: Tensor, weights: Tensor | None, reduction: int, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        first, second = (_empty(logits[0], logits.dtype, reduction) for _ in range(2))
        _stack(None, None, None, logits, weights, reduction, (None, None, None), (first, second), consensus=True)
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
        return _stack_backward((grad_mixture, grad_mean), logits, weights, reduction, needs, True)


def _stack_backward(
    grads: tuple[Tensor, Tensor | None],
    logits: Tensor,
    weights: Tensor | None,
    reduction: int,
    needs: Sequence[bool],
    consensus: bool,
) -> tuple[Tensor | None, Tensor | None]:
    to_logits = torch.empty_like(logits) if needs[0] else None
    to_weights = None
    if needs[1] and weights is not None:
        to_weights = torch.empty(weights.shape, dtype=compute_dtype(logits.dtype), device=logits.device)
    one, two = (None if grad is None else grad.resolve_neg() for grad in grads)
    _stack(one, two, None, logits, weights, reduction, (None, to_logits, to_weights), (None, None), consensus=consensus)
    return to_logits, None if to_weights is None or weights is None else to_weights.to(weights.dtype)


def _ensemble(
    grad: Tensor | None,
    student: Tensor,
    teachers: Tensor,
    weights: Tensor | None,
    class_mask: Tensor | None,
    settings: Ensemble,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    result: Tensor | None,
) -> None:
    if settings.mix == MEAN:
        to_student, to_teachers, to_weights = gradients
        _stack(
            grad, None, student, teachers, None if weights is None else weights.squeeze(2), settings.reduction,
            (to_student, to_teachers, None if to_weights is None else to_weights.squeeze(2)), (result, None),
            temperature=settings.temperature, log_probs=settings.log_probs and settings.temperature == 1,
        )  # fmt: skip
        return
    rows, reduction = row_count(student), settings.reduction
    if not rows:
        _clear(result, *gradients)
        return
    dtype = result_dtype(student, None, teachers)
    compute = compute_dtype(dtype)
    wanted, (to_student, to_teachers, to_weights) = gradients, gradients
    to_student, to_teachers = writable(to_student), writable(to_teachers, 2)
    gradients = (to_student, to_teachers, to_weights)
    student, teachers = readable(student, to_student), readable(teachers, to_teachers, 2)
    weights, grad = None if weights is None else readable(weights, None, 2), _readable_rows(grad)
    plan, steps = share(
        student,
        [
            _steps(student, 1),
            _steps(teachers, 2),
            _steps(weights, 2),
            row_steps_of(grad) or _NONE if reduction == NONE else _NONE,
            _steps(to_weights, 2),
        ],
        4,
        compute,
    )
    s_steps, t_steps, w_steps, g_steps, b_steps = steps
    log_probs = settings.log_probs and settings.temperature == 1
    tops, logs = _members(teachers, t_steps, plan, settings.temperature, compute, log_probs or settings.mix == LOGITS)
    terms, tiny = SERIES[compute]
    total = _total(result, reduction, plan)
    launch(
        mixture_kernel, plan.groups, student.device, student, teachers, weights,
        None if class_mask is None else class_mask.view(torch.uint8), grad, tops, logs, *gradients,
        result if reduction == NONE else None, total, double_bits(settings.temperature),
        rows if reduction == BATCHMEAN else 1, len(teachers), plan.inner, plan.classes, plan.tiles, rows,
        *s_steps, *t_steps, w_steps.outer, w_steps.row, 0 if weights is None or weights.shape[2] == 1 else w_steps[2],
        g_steps.outer, g_steps.row, *b_steps, teachers.stride(0), 0 if weights is None else weights.stride(0),
        *((0, 0) if class_mask is None else class_mask.stride()), 0 if to_weights is None else to_weights.stride(0),
        COMPUTE=COMPUTE[compute], TERMS=terms, TINY=tiny, LOGITS=settings.mix == LOGITS, LOG_PROBS=log_probs,
        BY_CLASS=to_weights is not None and to_weights.shape[2] > 1, MEAN=total is not None and total.dim() == 0,
        ROWS=plan.row_tile, COLUMNS=plan.column_tile, num_warps=WARPS,
    )  # fmt: skip
    if total is not None and result is not None and total is not result:
        finish(total, result, rows if reduction == BATCHMEAN else 1)
    hand_over(gradients, wanted)


def _stack(
    grad: Tensor | None,
    more_grad: Tensor | None,
    student: Tensor | None,
    logits: Tensor,
    weights: Tensor | None,
    reduction: int,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    results: tuple[Tensor | None, Tensor | None],
    *,
    consensus: bool = False,
    temperature: float = 1.0,
    log_probs: bool = False,
) -> None:
    rows = row_count(logits[0])
    if not rows:
        _clear(*results, *gradients)
        return
    dtype = logits.dtype if student is None else result_dtype(student, None, logits)
    compute, device = compute_dtype(dtype), logits.device
    wanted, (to_student, to_logits, to_weights) = gradients, gradients
    to_student, to_logits = writable(to_student), writable(to_logits, 2)
    gradients = (to_student, to_logits, to_weights)
    logits, student = readable(logits, to_logits, 2), None if student is None else readable(student, to_student)
    weights, grad, more_grad = _readable_members(weights), _readable_rows(grad), _readable_rows(more_grad)
    each = reduction == NONE
    plan, steps = share(
        logits[0],
        [
            _steps(logits, 2),
            _steps(student, 1),
            _NONE if weights is None else _steps(weights.unsqueeze(2), 2),
            row_steps_of(grad) or _NONE if each else _NONE,
            row_steps_of(more_grad) or _NONE if each else _NONE,
            _NONE if to_weights is None else _steps(to_weights.unsqueeze(2), 2),
        ],
        4,
        compute,
    )
    t_steps, s_steps, w_steps, g_steps, m_steps, b_steps = steps
    tops, logs = _members(logits, t_steps, plan, temperature, compute, log_probs)
    terms, tiny = SERIES[compute]
    totals = [_total(result, reduction, plan) for result in results]
    bound = math.log(len(logits)) if student is None and not consensus else math.inf
    launch(
        stack_kernel, plan.groups, device, student, logits, weights, grad, more_grad, tops, logs, *gradients,
        *(results if each else (None, None)), *totals, double_bits(temperature),
        rows if reduction == BATCHMEAN else 1, double_bits(bound), len(logits), plan.inner, plan.classes, plan.tiles,
        rows, *s_steps, *t_steps, w_steps.outer, w_steps.row, g_steps.outer, g_steps.row, m_steps.outer, m_steps.row,
        b_steps.outer, b_steps.row, logits.stride(0), 0 if weights is None else weights.stride(0),
        0 if to_weights is None else to_weights.stride(0), COMPUTE=COMPUTE[compute], TERMS=terms, TINY=tiny,
        CONSENSUS=consensus, LOG_PROBS=log_probs, MEAN=totals[0] is not None and totals[0].dim() == 0,
        ROWS=plan.row_tile, COLUMNS=plan.column_tile, num_warps=WARPS,
    )  # fmt: skip
    for total, result in zip(totals, results, strict=True):
        if total is not None and result is not None and total is not result:
            finish(total, result, rows if reduction == BATCHMEAN else 1)
    hand_over(gradients, wanted)


def _members(
    teachers: Tensor, steps: Steps, plan: Rows, temperature: float, compute: torch.dtype, known: bool
) -> tuple[Tensor | None, Tensor | None]:
    if known:
        return None, None
    rows = plan.outer * plan.inner
    tops, logs = torch.empty(2, len(teachers), rows, dtype=compute, device=teachers.device).unbind()
    launch(
        members_kernel, plan.groups * len(teachers), teachers.device, teachers, tops, logs, double_bits(temperature),
        plan.inner, plan.classes, plan.tiles, plan.groups, rows, teachers.stride(0), *steps,
        COMPUTE=COMPUTE[compute], ROWS=plan.row_tile, COLUMNS=plan.column_tile, num_warps=WARPS,
    )  # fmt: skip
    return tops, logs


def _is_rare(settings: Ensemble) -> bool:
    """What is left to plain PyTorch: the limit, and divergences of log-probabilities whose sum need not be 1."""
    if math.isinf(settings.temperature):
        backend.not_forced("ensemble_kl", "triton", "at infinite temperature")
        return True
    if settings.log_probs and settings.mix == MEAN:
        backend.not_forced("ensemble_kl", "triton", "with mode='mean_of_kl' and log_probs")
        return True
    return False


def _reference(student: Tensor, teachers: Tensor, weights: Any, class_mask: Any, settings: Ensemble) -> Tensor:
    return ensemble_reference(
        student, teachers, weights, class_mask, settings.temperature, settings.mix, settings.log_probs,
        settings.reduction,
    )  # fmt: skip


def _reference_gradients(
    grad: Tensor, student: Tensor, teachers: Tensor, weights: Any, class_mask: Any, settings: Ensemble,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    tensors = (student, teachers, weights, class_mask)
    one, two, three = reference_gradients(_reference, (grad,), tensors, (settings,), needs)
    return one, two, three


def _empty(logits: Tensor, dtype: torch.dtype, reduction: int) -> Tensor:
    return torch.empty(row_shape(logits) if reduction == NONE else (), dtype=dtype, device=logits.device)


def _total(result: Tensor | None, reduction: int, plan: Rows) -> Tensor | None:
    if result is None or reduction == NONE:
        return None
    return result if plan.groups == 1 else torch.empty(plan.groups, dtype=torch.float64, device=result.device)


def _clear(*tensors: Tensor | None) -> None:
    for x in tensors:
        if x is not None:
            x.zero_()


def _readable_rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or not x.dim() or row_steps_of(x) is not None else x.contiguous()


def _readable_members(x: Tensor | None) -> Tensor | None:
    return x if x is None or steps_of(x.unsqueeze(2), 2) is not None else x.contiguous()


def _steps(x: Tensor | None, axis: int) -> Steps:
    if x is None:
        return _NONE
    steps = steps_of(x, axis)
    assert steps is not None  # _readable() has seen to it
    return steps
