"""ensemble_kl's limit of infinite temperature in Triton: from tensors to launches."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkern.ops.distill_common import BATCHMEAN, LOGITS, MEAN, NONE, PROBS, row_count
from fedkern.ops.distill_kernels import Ensemble
from fedkern.ops.distill_reference import compute_dtype, result_dtype
from fedkern.ops.triton.distill_mixture_limits import mean_limit_kernel, members_limit_kernel, mixture_limit_kernel
from fedkern.ops.triton.launch import launch
from fedkern.ops.triton.rows import (
    ALL_ROWS,
    clear,
    finish,
    hand_over,
    known_steps,
    meta_of,
    readable,
    readable_rows,
    row_steps_of,
    share,
    totals_of,
    writable,
)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def limit(
    grad: Tensor | None,
    student: Tensor,
    teachers: Tensor,
    weights: Tensor | None,
    class_mask: Tensor | None,
    settings: Ensemble,
    gradients: Gradients,
    result: Tensor | None,
) -> None:
    """Writes the loss into ``result`` and gradients, times ``grad``, where there is memory for them."""
    rows, reduction = row_count(student), settings.reduction
    if not rows:
        clear(result, *gradients)
        return
    by_class = class_mask is not None or (weights is not None and weights.shape[2] > 1)
    if settings.mix == PROBS and by_class:
        _centred(grad, student, teachers, weights, class_mask, settings, gradients, result)
        return
    compute = compute_dtype(result_dtype(student, None, teachers))
    wanted, (to_student, to_teachers, to_weights) = gradients, gradients
    to_student, to_teachers = writable(to_student), writable(to_teachers, 2)
    gradients = (to_student, to_teachers, to_weights)
    student, teachers = readable(student, to_student), readable(teachers, to_teachers, 2)
    weights, grad = None if weights is None else readable(weights, None, 2), readable_rows(grad)
    plan, steps = share(
        student,
        [
            known_steps(student, 1),
            known_steps(teachers, 2),
            known_steps(weights, 2),
            row_steps_of(grad) or ALL_ROWS if reduction == NONE else ALL_ROWS,
            known_steps(to_weights, 2),
        ],
        4,
        compute,
    )
    s_steps, t_steps, w_steps, g_steps, b_steps = steps
    count, count_rows = len(teachers), rows if reduction == BATCHMEAN else 1
    total = totals_of(result, reduction, plan)
    results = (result if reduction == NONE else None, total)
    strides = (teachers.stride(0), 0 if weights is None else weights.stride(0))
    by_stride = 0 if to_weights is None else to_weights.stride(0)
    meta = meta_of(plan, compute, stack=True)
    mean = total is not None and total.dim() == 0
    if settings.mix == MEAN:
        found = torch.empty(3, count, rows, dtype=compute, device=student.device).unbind()
        launch(
            members_limit_kernel, plan.groups * count, student.device, student, teachers, *found,
            plan.inner, plan.classes, plan.tiles, plan.groups, rows, *s_steps, teachers.stride(0), *t_steps, **meta,
        )  # fmt: skip
        launch(
            mean_limit_kernel, plan.groups, student.device, student, teachers, weights, grad, *found, *gradients,
            *results, count_rows, count, plan.inner, plan.classes, plan.tiles, rows, *s_steps, *t_steps,
            w_steps.outer, w_steps.row, g_steps.outer, g_steps.row, b_steps.outer, b_steps.row, *strides, by_stride,
            MEAN=mean, **meta,
        )  # fmt: skip
    else:
        # Weights by a launch of their own: with the teachers' gradients in one, registers spill.
        for part in ((to_student, to_teachers, None), (None, None, to_weights)):
            first = part[2] is None
            if not first and to_weights is None:
                break
            launch(
                mixture_limit_kernel, plan.groups, student.device, student, teachers, weights,
                None if class_mask is None else class_mask.view(torch.uint8), grad, *part,
                *(results if first else (None, None)), count_rows, count, plan.inner, plan.classes, plan.tiles,
                *s_steps, *t_steps, w_steps.outer, w_steps.row,
                0 if weights is None or weights.shape[2] == 1 else w_steps.column, g_steps.outer, g_steps.row,
                *b_steps, *strides, *((0, 0) if class_mask is None else class_mask.stride()), by_stride,
                BY_CLASS=not first and to_weights is not None and to_weights.shape[2] > 1, MEAN=mean, **meta,
            )  # fmt: skip
    if total is not None and result is not None and total is not result:
        finish(total, result, count_rows)
    hand_over(gradients, wanted)


def _centred(
    grad: Tensor | None,
    student: Tensor,
    teachers: Tensor,
    weights: Tensor | None,
    class_mask: Tensor | None,
    settings: Ensemble,
    gradients: Gradients,
    result: Tensor | None,
) -> None:
    """:func:`limit` of probabilities whose weights differ between classes: the mixture of centred logits.

    To first order in 1/T a softmax is (1 + (x − mean x) / T) / C; elsewhere the mean is the same for all classes.
    """
    to_student, to_teachers, to_weights = gradients
    wide = teachers.to(compute_dtype(result_dtype(student, None, teachers)))
    known = wide != -torch.inf
    number = known.sum(2, keepdim=True)
    centred = wide - torch.where(known, wide, 0).sum(2, keepdim=True) / number
    toward = None if to_teachers is None else torch.empty_like(centred)
    mixed = Ensemble(settings.temperature, LOGITS, settings.log_probs, settings.reduction)
    limit(grad, student, centred, weights, class_mask, mixed, (to_student, toward, to_weights), result)
    if to_teachers is not None and toward is not None:
        to_teachers.copy_(torch.where(known, toward - toward.sum(2, keepdim=True) / number, 0))
