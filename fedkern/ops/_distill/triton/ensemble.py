"""ensemble_kl, js_div and consensus in Triton: from tensors to launches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedkern.ops._core.backend import compute_dtype
from fedkern.ops._core.triton.launch import double_bits, launch
from fedkern.ops._core.triton.numbers import finish
from fedkern.ops._distill.kernels import Ensemble, Gradients
from fedkern.ops._distill.reference import result_dtype
from fedkern.ops._distill.rows import BATCHMEAN, LOGITS, MEAN, NONE, row_count
from fedkern.ops._distill.triton.members import stack_kernel
from fedkern.ops._distill.triton.mixture import members_kernel, mixture_kernel
from fedkern.ops._distill.triton.rows import (
    ALL_ROWS,
    SERIES,
    Rows,
    Steps,
    clear,
    hand_over,
    known_steps,
    meta_of,
    readable,
    readable_rows,
    row_steps_of,
    share,
    steps_of,
    totals_of,
    writable,
)
from fedkern.ops._distill.triton.stacks import Call


def ensemble(
    grad: Tensor | None,
    student: Tensor,
    teachers: Tensor,
    weights: Tensor | None,
    class_mask: Tensor | None,
    settings: Ensemble,
    dtype: torch.dtype,
    by_class: bool,
    gradients: Gradients,
    result: Tensor | None,
) -> None:
    """:meth:`fedkern.ops._distill.kernels.DistillKernels._ensemble` in Triton."""
    if settings.mix == MEAN:
        to_student, to_teachers, to_weights = gradients
        stack(
            grad, None, student, teachers, None if weights is None else weights.squeeze(2), settings.reduction,
            (to_student, to_teachers, None if to_weights is None else to_weights.squeeze(2)), (result, None),
            temperature=settings.temperature, log_probs=settings.log_probs and settings.temperature == 1,
        )  # fmt: skip
        return
    if not row_count(student):
        clear(result, *gradients)
        return
    call = Call.of(grad, student, teachers, weights, class_mask, settings, gradients, result)
    plan, compute = call.plan, call.compute
    log_probs = settings.log_probs and settings.temperature == 1
    known = log_probs or settings.mix == LOGITS
    tops, logs = _members(call.teachers, call.steps[1], plan, settings.temperature, compute, known)
    terms = SERIES[compute]
    launch(
        mixture_kernel, plan.groups, student.device, call.student, call.teachers, call.weights, call.mask, call.grad,
        tops, logs, *call.gradients, call.losses, call.total, double_bits(settings.temperature), call.count_rows,
        len(teachers), plan.inner, plan.classes, plan.tiles, row_count(student), *call.strides,
        TERMS=terms, LOGITS=settings.mix == LOGITS, LOG_PROBS=log_probs, BY_CLASS=call.by_class,
        MEAN=call.mean, **meta_of(plan, compute, stack=True),
    )  # fmt: skip
    call.close()


def stack(
    grad: Tensor | None,
    more_grad: Tensor | None,
    student: Tensor | None,
    logits: Tensor,
    weights: Tensor | None,
    reduction: int,
    gradients: Gradients,
    results: tuple[Tensor | None, Tensor | None],
    *,
    consensus: bool = False,
    temperature: float = 1.0,
    log_probs: bool = False,
) -> None:
    rows = row_count(logits[0])
    if not rows:
        clear(*results, *gradients)
        return
    dtype = logits.dtype if student is None else result_dtype(student, None, logits)
    compute, device = compute_dtype(dtype), logits.device
    wanted, (to_student, to_logits, to_weights) = gradients, gradients
    to_student, to_logits = writable(to_student), writable(to_logits, 2)
    gradients = (to_student, to_logits, to_weights)
    logits, student = readable(logits, to_logits, 2), None if student is None else readable(student, to_student)
    weights, grad, more_grad = _readable_members(weights), readable_rows(grad), readable_rows(more_grad)
    each = reduction == NONE
    plan, steps = share(
        logits[0],
        [
            known_steps(logits, 2),
            known_steps(student, 1),
            known_steps(None if weights is None else weights.unsqueeze(2), 2),
            row_steps_of(grad) or ALL_ROWS if each else ALL_ROWS,
            row_steps_of(more_grad) or ALL_ROWS if each else ALL_ROWS,
            known_steps(None if to_weights is None else to_weights.unsqueeze(2), 2),
        ],
        4,
        compute,
    )
    t_steps, s_steps, w_steps, g_steps, m_steps, b_steps = steps
    tops, logs = _members(logits, t_steps, plan, temperature, compute, log_probs)
    terms = SERIES[compute]
    totals = [totals_of(result, reduction, plan) for result in results]
    bound = math.log(len(logits)) if student is None and not consensus else math.inf
    launch(
        stack_kernel, plan.groups, device, student, logits, weights, grad, more_grad, tops, logs, *gradients,
        *(results if each else (None, None)), *totals, double_bits(temperature),
        rows if reduction == BATCHMEAN else 1, double_bits(bound), len(logits), plan.inner, plan.classes, plan.tiles,
        rows, *s_steps, *t_steps, w_steps.outer, w_steps.row, g_steps.outer, g_steps.row, m_steps.outer, m_steps.row,
        b_steps.outer, b_steps.row, logits.stride(0), 0 if weights is None else weights.stride(0),
        0 if to_weights is None else to_weights.stride(0), TERMS=terms,
        CONSENSUS=consensus, LOG_PROBS=log_probs, MEAN=totals[0] is not None and totals[0].dim() == 0,
        **meta_of(plan, compute, stack=True),
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
        **meta_of(plan, compute, stack=True),
    )  # fmt: skip
    return tops, logs


def _readable_members(x: Tensor | None) -> Tensor | None:
    return x if x is None or steps_of(x.unsqueeze(2), 2) is not None else x.contiguous()
