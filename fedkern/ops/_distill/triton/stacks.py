"""ensemble_kl in Triton: work before and after a launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedkern.ops._core.backend import compute_dtype
from fedkern.ops._core.triton.numbers import finish
from fedkern.ops._distill.kernels import Ensemble, Gradients
from fedkern.ops._distill.reference import result_dtype
from fedkern.ops._distill.rows import BATCHMEAN, NONE, row_count
from fedkern.ops._distill.triton.rows import (
    ALL_ROWS,
    Rows,
    Steps,
    hand_over,
    known_steps,
    make_readable,
    make_rows_readable,
    make_writable,
    plan_rows,
    row_steps_of,
    totals_of,
)


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
        plan, steps = plan_rows(
            student,
            [
                known_steps(student, 1),
                known_steps(teachers, 2),
                known_steps(weights, 2),
                row_steps_of(grad) or ALL_ROWS if by_row else ALL_ROWS,
                known_steps(to_weights, 2),
            ],
            4,
            compute,
        )
        return cls(
            compute, plan, row_count(student) if reduction == BATCHMEAN else 1, student, teachers, weights,
            None if class_mask is None else class_mask.view(torch.uint8), grad, (to_student, to_teachers, to_weights),
            gradients, result if by_row else None, totals_of(result, reduction, plan), result, steps,
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
        hand_over(self.gradients, self.targets)
