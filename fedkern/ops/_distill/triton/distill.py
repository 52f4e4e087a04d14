"""The distill family in Triton: from tensors to launches of the kernels in losses.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedkern.ops._core.backend import compute_dtype
from fedkern.ops._core.triton.launch import double_bits, launch, power_of_two
from fedkern.ops._core.triton.numbers import finish
from fedkern.ops._distill.kernels import NO_GRADIENTS, DistillKernels, Divergence, Gradients
from fedkern.ops._distill.reference import result_dtype
from fedkern.ops._distill.rows import BATCHMEAN, NONE, row_count, row_shape
from fedkern.ops._distill.triton import rows as layout
from fedkern.ops._distill.triton.ensemble import ensemble
from fedkern.ops._distill.triton.losses import divergence_kernel, entropy_kernel
from fedkern.ops._distill.triton.rows import Rows, Steps, make_readable, make_rows_readable, make_writable


class TritonDistill(DistillKernels):
    """:class:`fedkern.ops._distill.kernels.DistillKernels` with Triton kernels in place of a core."""

    short_weights = limits = False

    def __init__(self) -> None:
        self.gpu, self.fused, self.keeps, self.sparse = True, False, False, False  # also interpreted on CPU tensors

    def _divergence(
        self,
        grad: Tensor | None,
        call: Divergence,
        dtype: torch.dtype,
        gradients: Gradients,
        raw: Tensor | None,
        result: Tensor | None,
        statistics: Tensor | None = None,
    ) -> None:
        student, peer, teacher, weight, temperature, reverse, reduction = call
        if student is None:
            self._entropy(grad, teacher, reduction, gradients[2], result)
            return
        # Kernels need a single stride through the positions: other tensors are copied.
        compute, device = compute_dtype(dtype), student.device
        targets, (to_student, to_peer, to_teacher) = gradients, (make_writable(x) for x in gradients)
        gradients = (to_student, to_peer, to_teacher)
        rows = row_count(student)
        if not rows:
            layout.zero_all(result)
            return
        student, teacher = make_readable(student, to_student), make_readable(teacher, to_teacher)
        peer = None if peer is None else make_readable(peer, to_peer)
        weight, grad = make_rows_readable(weight), make_rows_readable(grad)
        logit_steps = [layout.known_steps(x) for x in (teacher, student, teacher if peer is None else peer)]
        by_row = [layout.row_steps_of(weight), layout.row_steps_of(grad) if reduction == NONE else layout.ALL_ROWS]
        # Batches and positions become one axis if all tensors allow.
        plan, steps = layout.plan_rows(
            teacher, [*logit_steps, *(s for s in by_row if s is not None)], 2 if peer is None else 3, compute
        )
        count = max(rows, 1) if reduction == BATCHMEAN else 1
        t_steps, s_steps, o_steps, w_steps, g_steps = steps
        strides = (*t_steps, *s_steps, *o_steps, w_steps.outer, w_steps.row, g_steps.outer, g_steps.row)
        meta = layout.meta_of(plan, compute)

        def run(
            to: tuple[Tensor | None, ...],
            losses: Tensor | None,
            raw: Tensor | None,
            total: Tensor | None,
            parts: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
            values: Tensor | None = None,
        ) -> None:
            mean = total is not None and total.dim() == 0
            to_student, to_peer, to_teacher = to
            tensors = (teacher, student, peer, weight, grad, to_teacher, to_student, to_peer, losses, raw, total)
            launch(
                divergence_kernel, plan.groups * plan.splits, device, *tensors, *parts, values,
                double_bits(temperature), count, plan.inner, plan.classes, plan.tiles, plan.splits, plan.span,
                rows, *strides, TERMS=layout.SERIES[compute], REVERSE=reverse, MEAN=mean, WHOLE=plan.whole,
                SPLITS=power_of_two(plan.splits), **meta,
            )  # fmt: skip

        if plan.splits == 1:
            losses = result if reduction == NONE else None
            total = layout.totals_of(result, reduction, plan)
            run(gradients, losses, raw, total)
            if total is not None and result is not None and total is not result:
                finish(total, result, count)
            layout.hand_over(gradients, targets)
            return

        # Rows split among programs: statistics first, then the rows' losses if wanted, or needed by a gradient.
        parts = _statistics([x for x in (teacher, student, peer) if x is not None], steps, plan, temperature, compute)
        values = None
        by_value = (to_student is not None or to_peer is not None) if reverse else to_teacher is not None
        if by_value:
            values = torch.empty(2, rows, dtype=compute, device=device)
            for place, x in enumerate((student, peer)):
                if x is not None:
                    values[place] = self._row_values(Divergence(x, None, teacher, None, temperature, reverse, NONE))
        if result is not None or raw is not None:
            losses = torch.empty(rows, plan.splits, dtype=compute, device=device)
            unweighted = torch.empty_like(losses) if raw is not None else None
            run(NO_GRADIENTS, losses, unweighted, None, parts)
            if raw is not None and unweighted is not None:
                torch.sum(unweighted, 1, out=raw.view(-1))
            if result is not None:
                if reduction == NONE:
                    result.copy_(losses.sum(1).view(result.shape))
                else:
                    finish(losses.to(torch.float64), result, count)
        if any(x is not None for x in gradients):
            run(gradients, None, None, None, parts, values)
            layout.hand_over(gradients, targets)

    def _row_values(self, call: Divergence) -> Tensor:
        """Compute KL of each row, without the factor T²."""
        teacher, dtype = call.teacher, result_dtype(call.student, None, call.teacher)
        raw = torch.empty(row_shape(teacher), dtype=compute_dtype(dtype), device=teacher.device)
        self._divergence(None, call, dtype, NO_GRADIENTS, raw, None)
        return raw.view(-1) / call.temperature**2

    def _entropy(
        self, grad: Tensor | None, logits: Tensor, reduction: int, gradient: Tensor | None, result: Tensor | None
    ) -> None:
        rows, compute, device = row_count(logits), compute_dtype(logits.dtype), logits.device
        if not rows:
            layout.zero_all(result)
            return
        target, gradient = gradient, make_writable(gradient)
        logits, grad = make_readable(logits, gradient), make_rows_readable(grad)
        by_row = layout.row_steps_of(grad) if reduction == NONE else layout.ALL_ROWS
        assert by_row is not None
        # Batches and positions become one axis if both tensors allow.
        plan, (steps, g_steps) = layout.plan_rows(logits, [layout.known_steps(logits), by_row], 1, compute)
        count = rows if reduction == BATCHMEAN else 1

        def run(
            to: Tensor | None,
            losses: Tensor | None,
            total: Tensor | None,
            parts: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
            values: Tensor | None = None,
        ) -> None:
            launch(
                entropy_kernel, plan.groups * plan.splits, device, logits, grad, to, losses, total, *parts, values,
                count, plan.inner, plan.classes, plan.tiles, plan.splits, plan.span, *steps,
                g_steps.outer, g_steps.row, MEAN=total is not None and total.dim() == 0, WHOLE=plan.whole,
                SPLITS=power_of_two(plan.splits), **layout.meta_of(plan, compute),
            )  # fmt: skip

        if plan.splits == 1:
            total = layout.totals_of(result, reduction, plan)
            run(gradient, result if reduction == NONE else None, total)
            if total is not None and result is not None and total is not result:
                finish(total, result, count)
            layout.hand_over((gradient,), (target,))
            return
        # Rows split among programs: statistics first, then the rows' entropies, which the gradient needs.
        parts = _statistics([logits], [steps], plan, 1.0, compute)
        losses = torch.empty(rows, plan.splits, dtype=compute, device=device)
        run(None, losses, None, parts)
        values = losses.sum(1)
        if result is not None:
            if reduction == NONE:
                result.copy_(values.view(result.shape))
            else:
                finish(losses.to(torch.float64), result, count)
        if gradient is not None:
            run(gradient, None, None, parts, values)
            layout.hand_over((gradient,), (target,))

    _ensemble = staticmethod(ensemble)


def _statistics(
    tensors: Sequence[Tensor], steps: Sequence[Steps], plan: Rows, temperature: float, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape, device = (len(tensors), plan.outer * plan.inner, plan.splits), tensors[0].device
    tops, totals = torch.empty(2, *shape, dtype=compute, device=device).unbind()
    for x, step, top, total in zip(tensors, steps, tops, totals, strict=False):
        launch(
            layout.statistics_kernel, plan.groups * plan.splits, device, x, top, total, double_bits(temperature),
            plan.inner, plan.classes, plan.tiles, plan.splits, plan.span, *step,
            **layout.meta_of(plan, compute),
        )  # fmt: skip
    return tops, totals
