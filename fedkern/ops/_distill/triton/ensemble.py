"""ensemble_kl, js_div and consensus in Triton: from tensors to launches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fedkern.ops._core.backend import compute_dtype
from fedkern.ops._core.triton.launch import double_bits, launch
from fedkern.ops._core.triton.numbers import finish
from fedkern.ops._distill.kernels import CONSENSUS, JS, Ensemble, Gradients, Pair
from fedkern.ops._distill.reference import result_dtype
from fedkern.ops._distill.rows import BATCHMEAN, LOGITS, MEAN, NONE, row_count
from fedkern.ops._distill.triton import rows as layout
from fedkern.ops._distill.triton.members import stack_kernel
from fedkern.ops._distill.triton.mixture import members_kernel, mixture_kernel
from fedkern.ops._distill.triton.rows import Rows, Steps, make_readable, make_rows_readable, make_writable


class Mixture(NamedTuple):
    """Tensors of a call of ensemble_kl with a mixture, and memory for its results."""

    compute: torch.dtype
    plan: Rows
    count_rows: int  # divisor of the sums
    student: Tensor
    teachers: Tensor
    weights: Tensor | None
    mask: Tensor | None
    grad: Tensor | None
    gradients: Gradients
    targets: Gradients
    losses: Tensor | None
    total: Tensor | None
    result: Tensor | None
    steps: list[Steps]
    """Strides of student, teachers, weights, grad and the weights' gradient."""

    @classmethod
    def of(
        cls, grad: Tensor | None, student: Tensor, call: Ensemble, gradients: Gradients, result: Tensor | None
    ) -> Mixture:
        _, teachers, weights, class_mask, _, _, _, reduction = call
        by_row = reduction == NONE
        compute = compute_dtype(result_dtype(student, None, teachers))
        to_student, to_teachers, to_weights = make_writable(gradients[0]), make_writable(gradients[1], 2), gradients[2]
        student, teachers = make_readable(student, to_student), make_readable(teachers, to_teachers, 2)
        weights, grad = None if weights is None else make_readable(weights, None, 2), make_rows_readable(grad)
        plan, steps = layout.plan_rows(
            student,
            [
                layout.known_steps(student, 1),
                layout.known_steps(teachers, 2),
                layout.known_steps(weights, 2),
                layout.row_steps_of(grad) or layout.ALL_ROWS if by_row else layout.ALL_ROWS,
                layout.known_steps(to_weights, 2),
            ],
            4,
            compute,
        )
        return cls(
            compute, plan, row_count(student) if reduction == BATCHMEAN else 1, student, teachers, weights,
            None if class_mask is None else class_mask.view(torch.uint8), grad, (to_student, to_teachers, to_weights),
            gradients, result if by_row else None, layout.totals_of(result, reduction, plan), result, steps,
        )  # fmt: skip

    @property
    def mean(self) -> bool:
        """Return whether the only program divides its sum itself, without :func:`finish`."""
        return self.total is not None and self.total.dim() == 0

    @property
    def by_class(self) -> bool:
        to_weights = self.gradients[2]
        return to_weights is not None and to_weights.shape[2] > 1

    @property
    def strides(self) -> tuple[int, ...]:
        """Return the kernel's strides: from batch to batch, row to row, class to class, teacher to teacher."""
        of_student, of_teachers, of_weights, of_grad, of_gradient = self.steps
        weights, to_weights = self.weights, self.gradients[2]
        return (
            *of_student, *of_teachers, of_weights.outer, of_weights.row,
            0 if weights is None or weights.shape[2] == 1 else of_weights.column,
            of_grad.outer, of_grad.row, *of_gradient,
            self.teachers.stride(0), 0 if weights is None else weights.stride(0),
            *((0, 0) if self.mask is None else self.mask.stride()), 0 if to_weights is None else to_weights.stride(0),
        )  # fmt: skip

    def close(self) -> None:
        if self.total is not None and self.result is not None and self.total is not self.result:
            finish(self.total, self.result, self.count_rows)
        layout.hand_over(self.gradients, self.targets)


def ensemble(
    grads: Pair,
    call: Ensemble,
    dtype: torch.dtype,
    by_class: bool,
    gradients: Gradients,
    results: Pair,
    statistics: Tensor | None = None,
) -> None:
    """Implement :meth:`~fedkern.ops._distill.kernels.DistillKernels._ensemble`."""
    student, teachers, weights, _, temperature, mix, log_probs, _ = call
    log_probs = log_probs and temperature == 1
    if student is None or mix == MEAN:
        if mix == MEAN:
            to_student, to_teachers, to_weights = gradients
            call = call._replace(weights=None if weights is None else weights.squeeze(2))
            gradients = (to_student, to_teachers, None if to_weights is None else to_weights.squeeze(2))
        stack(grads, call, log_probs, gradients, results)
        return
    if not row_count(student):
        layout.zero_all(results[0], *gradients)
        return
    mixture = Mixture.of(grads[0], student, call, gradients, results[0])
    plan, compute = mixture.plan, mixture.compute
    as_is = log_probs or mix == LOGITS
    tops, logs = _members(mixture.teachers, mixture.steps[1], plan, temperature, compute, as_is)
    launch(
        mixture_kernel, plan.groups, student.device, mixture.student, mixture.teachers, mixture.weights, mixture.mask,
        mixture.grad, tops, logs, *mixture.gradients, mixture.losses, mixture.total, double_bits(temperature),
        mixture.count_rows, len(teachers), plan.inner, plan.classes, plan.tiles, row_count(student), *mixture.strides,
        TERMS=layout.SERIES[compute], LOGITS=mix == LOGITS, LOG_PROBS=log_probs, BY_CLASS=mixture.by_class,
        MEAN=mixture.mean, **layout.meta_of(plan, compute, stack=True),
    )  # fmt: skip
    mixture.close()


def stack(grads: Pair, call: Ensemble, log_probs: bool, gradients: Gradients, results: Pair) -> None:
    """Compute js_div, consensus, and ensemble_kl's mean of divergences."""
    student, logits, weights, _, temperature, mix, _, reduction = call
    grad, more_grad = grads
    rows = row_count(logits[0])
    if not rows:
        layout.zero_all(*results, *gradients)
        return
    # Kernels need a single stride through the positions: other tensors are copied.
    compute, device = compute_dtype(result_dtype(student, None, logits)), logits.device
    targets, (to_student, to_logits, to_weights) = gradients, gradients
    to_student, to_logits = make_writable(to_student), make_writable(to_logits, 2)
    gradients = (to_student, to_logits, to_weights)
    logits = make_readable(logits, to_logits, 2)
    student = None if student is None else make_readable(student, to_student)
    weights, grad, more_grad = _readable_members(weights), make_rows_readable(grad), make_rows_readable(more_grad)
    by_row = reduction == NONE
    plan, steps = layout.plan_rows(
        logits[0],
        [
            layout.known_steps(logits, 2),
            layout.known_steps(student, 1),
            layout.known_steps(None if weights is None else weights.unsqueeze(2), 2),
            layout.row_steps_of(grad) or layout.ALL_ROWS if by_row else layout.ALL_ROWS,
            layout.row_steps_of(more_grad) or layout.ALL_ROWS if by_row else layout.ALL_ROWS,
            layout.known_steps(None if to_weights is None else to_weights.unsqueeze(2), 2),
        ],
        4,
        compute,
    )
    t_steps, s_steps, w_steps, g_steps, m_steps, b_steps = steps
    tops, logs = _members(logits, t_steps, plan, temperature, compute, log_probs)
    totals = [layout.totals_of(result, reduction, plan) for result in results]
    # js_div is at most log K, which rounding must not exceed.
    bound = math.log(len(logits)) if mix == JS else math.inf
    launch(
        stack_kernel, plan.groups, device, student, logits, weights, grad, more_grad, tops, logs, *gradients,
        *(results if by_row else (None, None)), *totals, double_bits(temperature),
        rows if reduction == BATCHMEAN else 1, double_bits(bound), len(logits), plan.inner, plan.classes, plan.tiles,
        rows, *s_steps, *t_steps, w_steps.outer, w_steps.row, g_steps.outer, g_steps.row, m_steps.outer, m_steps.row,
        b_steps.outer, b_steps.row, logits.stride(0), 0 if weights is None else weights.stride(0),
        0 if to_weights is None else to_weights.stride(0), TERMS=layout.SERIES[compute],
        CONSENSUS=mix == CONSENSUS, LOG_PROBS=log_probs, MEAN=totals[0] is not None and totals[0].dim() == 0,
        **layout.meta_of(plan, compute, stack=True),
    )  # fmt: skip
    for total, result in zip(totals, results, strict=True):
        if total is not None and result is not None and total is not result:
            finish(total, result, rows if reduction == BATCHMEAN else 1)
    layout.hand_over(gradients, targets)


def _members(
    teachers: Tensor, steps: Steps, plan: Rows, temperature: float, compute: torch.dtype, as_is: bool
) -> tuple[Tensor | None, Tensor | None]:
    if as_is:
        return None, None
    rows = plan.outer * plan.inner
    tops, logs = torch.empty(2, len(teachers), rows, dtype=compute, device=teachers.device).unbind()
    launch(
        members_kernel, plan.groups * len(teachers), teachers.device, teachers, tops, logs, double_bits(temperature),
        plan.inner, plan.classes, plan.tiles, plan.groups, rows, teachers.stride(0), *steps,
        **layout.meta_of(plan, compute, stack=True),
    )  # fmt: skip
    return tops, logs


def _readable_members(x: Tensor | None) -> Tensor | None:
    return x if x is None or layout.steps_of(x.unsqueeze(2), 2) is not None else x.contiguous()
