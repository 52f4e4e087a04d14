"""ensemble_kl at infinite temperature in Triton: from tensors to launches."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkern.ops._core.backend import compute_dtype
from fedkern.ops._core.triton.launch import launch
from fedkern.ops._distill.kernels import Ensemble, Gradients
from fedkern.ops._distill.rows import MEAN, PROBS, row_count
from fedkern.ops._distill.triton.mixture_limits import mean_limit_kernel, members_limit_kernel, mixture_limit_kernel
from fedkern.ops._distill.triton.rows import clear, meta_of
from fedkern.ops._distill.triton.stacks import Call


def limit(
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
    """Writes the loss into ``result``, and gradients times ``grad`` into ``gradients``, where these are not None."""
    if not row_count(student):
        clear(result, *gradients)
        return
    # To first order in 1/T a softmax is (1 + (x − mean x) / T) / C. The mean matters if weights differ between
    # classes: then the logits are centred before they are mixed.
    centred = settings.mix == PROBS and by_class
    to_student, to_teachers, to_weights = gradients
    known = number = teachers
    if centred:
        wide = teachers.to(compute_dtype(dtype))
        known = wide != -torch.inf
        number = known.sum(2, keepdim=True)
        teachers = wide - torch.where(known, wide, 0).sum(2, keepdim=True) / number
        to_teachers = None if to_teachers is None else torch.empty_like(teachers)
    call = Call.of(
        grad, student, teachers, weights, class_mask, settings, (to_student, to_teachers, to_weights), result
    )
    (_means if settings.mix == MEAN else _mixtures)(call)
    call.close()
    if centred and gradients[1] is not None and to_teachers is not None:
        gradients[1].copy_(torch.where(known, to_teachers - to_teachers.sum(2, keepdim=True) / number, 0))


def _means(call: Call) -> None:
    """Half the variance of each teacher minus the student, then the weighted mean of the K halves."""
    plan, student, teachers = call.plan, call.student, call.teachers
    s_steps, t_steps, w_steps, g_steps, b_steps = call.steps
    count, rows, to_weights = len(teachers), row_count(student), call.gradients[2]
    found = torch.empty(3, count, rows, dtype=call.compute, device=student.device).unbind()
    meta = meta_of(plan, call.compute, stack=True)
    launch(
        members_limit_kernel, plan.groups * count, student.device, student, teachers, *found,
        plan.inner, plan.classes, plan.tiles, plan.groups, rows, *s_steps, teachers.stride(0), *t_steps, **meta,
    )  # fmt: skip
    launch(
        mean_limit_kernel, plan.groups, student.device, student, teachers, call.weights, call.grad, *found,
        *call.gradients, call.losses, call.total, call.count_rows, count, plan.inner, plan.classes, plan.tiles, rows,
        *s_steps, *t_steps, w_steps.outer, w_steps.row, g_steps.outer, g_steps.row, b_steps.outer, b_steps.row,
        teachers.stride(0), 0 if call.weights is None else call.weights.stride(0),
        0 if to_weights is None else to_weights.stride(0), MEAN=call.mean, **meta,
    )  # fmt: skip


def _mixtures(call: Call) -> None:
    """Half the variance of the mixture of logits minus the student's."""
    plan, student = call.plan, call.student
    to_student, to_teachers, to_weights = call.gradients
    launches: list[tuple[Tensor | None, ...]] = [(to_student, to_teachers, None, call.losses, call.total)]
    if to_weights is not None:  # a launch of its own: together with the teachers' gradients, registers spill
        launches.append((None, None, to_weights, None, None))
    for written in launches:
        launch(
            mixture_limit_kernel, plan.groups, student.device, student, call.teachers, call.weights, call.mask,
            call.grad, *written, call.count_rows, len(call.teachers), plan.inner, plan.classes, plan.tiles,
            *call.strides, BY_CLASS=written[2] is not None and call.by_class, MEAN=call.mean,
            **meta_of(plan, call.compute, stack=True),
        )  # fmt: skip
