"""kl_div, dual_kl: Kullback-Leibler divergence between the softmaxes of one or two students and a teacher.

The reference is in distill_reference.py, the torch.library entry in distill_kl_library.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops import _library
from fedkern.ops.backend import DTYPES, eager, select
from fedkern.ops.distill_common import (
    BATCHMEAN,
    MAX_DIMS,
    NONE,
    REDUCTIONS,
    check_logits,
    check_reduction,
    check_temperature,
    check_weight,
    row_count,
    row_shape,
)
from fedkern.ops.distill_kl_library import DIVERGENCE
from fedkern.ops.distill_launch import divergence_backward, divergence_forward, weight_gradient
from fedkern.ops.distill_reference import compute_dtype, divergence_reference, result_dtype

# the public functions: checks and choice of path


def kl_div(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """Distillation loss ``T² · KL(softmax(teacher / T) ‖ softmax(student / T))`` (Hinton et al., arXiv 1503.02531).

    Args:
        student: logits ``[B, C]`` or ``[B, C, *positions]``; float32, float64, bfloat16 or float16, any strides.
        teacher: logits of the same shape; its dtype may differ.
        temperature: T > 0, the same units as the logits. ``math.inf`` is the exact limit, half the variance over
            classes of ``teacher - student``.
        weight: ``[B]`` or ``[B, *positions]``, floating or bool; multiplies each row's loss. A row of weight 0 counts
            exactly zero in the loss and in every gradient, whatever it holds.
        reduction: ``"none"`` (one value per row), ``"sum"``, or ``"batchmean"`` (the sum over the number of rows,
            B × positions; 0 for an empty batch).

    Returns:
        ``[B, *positions]`` for ``"none"``, else a scalar, in the promoted dtype of student and teacher. Everything is
        computed in float32 (float64 where an input is float64) and rounded once; autocast changes nothing here.

    Gradients go to student, teacher and weight, whichever require one, each in its own dtype. A class whose teacher
    logit is ``-inf`` contributes nothing to the teacher's side and gets no gradient there; one masked only in the
    student makes the loss ``+inf`` (with ``temperature=math.inf`` classes masked in either are left out).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices, temperature or reduction that do not fit.
    """
    return _dispatch(student, None, teacher, weight, temperature, False, reduction, ("student", "teacher"))


def dual_kl(
    a: Tensor,
    b: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    direction: str = "teacher",
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """Two divergences from one reading of the teacher (the distillation loss of FedGID, arXiv 2504.00850).

    ``direction="teacher"``: ``T² (KL(teacher ‖ a) + KL(teacher ‖ b))``;
    ``direction="student"``: ``T² (KL(a ‖ teacher) + KL(b ‖ teacher))``, where each name stands for its softmax at T.

    Args:
        a, b, teacher: logits of one shape, as in :func:`kl_div`, whose other arguments, results, gradients and errors
            this function shares. The weight multiplies both divergences of a row.
        direction: whose probabilities weight the logarithms.
    """
    if direction not in ("teacher", "student"):
        raise ValueError(f'direction must be "teacher" or "student", but is {direction!r}')
    return _dispatch(a, b, teacher, weight, temperature, direction == "student", reduction, ("a", "b", "teacher"))


def _dispatch(
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: str,
    names: tuple[str, ...],
) -> Tensor:
    tensors = (student, teacher) if other is None else (student, other, teacher)
    try:
        shape = student.shape
        fits = (
            teacher.shape == shape
            and student.dtype in DTYPES
            and teacher.dtype in DTYPES
            and student.device == teacher.device
            and 2 <= len(shape) <= MAX_DIMS
            and shape[1] != 0
            and (other is None or (other.shape == shape and other.dtype in DTYPES and other.device == teacher.device))
        )
    except AttributeError:
        fits = False
    if not fits:
        check_logits(names, tensors)
    if type(temperature) is not float or not temperature > 0:
        temperature = check_temperature(temperature)
    code = REDUCTIONS.get(reduction) if type(reduction) is str else None
    if code is None:
        code = check_reduction(reduction)
    if weight is not None:
        weight = check_weight(weight, student, torch.float32)
        tensors = (*tensors, weight)

    if not eager(*tensors):
        return DIVERGENCE(student, other, teacher, weight, temperature, reverse, code)
    core = select("kl_div" if other is None else "dual_kl", *tensors)
    if core is None:
        return divergence_reference(student, other, teacher, weight, temperature, reverse, code)
    if torch.is_grad_enabled() and _any_requires_grad(tensors):
        return _Divergence.apply(student, other, teacher, weight, temperature, reverse, code, core)
    return divergence_forward(core, student, other, teacher, weight, temperature, reverse, code)


def _any_requires_grad(tensors: tuple[Tensor, ...]) -> bool:
    # A loop: at 64 rows a generator is a visible part of the call.
    for tensor in tensors:  # noqa: SIM110
        if tensor.requires_grad:
            return True
    return False


# forward and backward, each one call into the core


class _Divergence(torch.autograd.Function):
    """The eager path: the gradient for a grad_output of 1 falls out of the forward pass, while the row is cached.

    Two cases wait for the backward pass instead: ``"none"``, whose grad_output is rarely 1, and float16 gradients,
    which would underflow before a loss scale could lift them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        other: Tensor | None,
        teacher: Tensor,
        weight: Tensor | None,
        temperature: float,
        reverse: bool,
        reduction: int,
        core: Any,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        half = torch.float16
        early = reduction != NONE and not (
            (needs[0] and student.dtype is half)
            or (needs[2] and teacher.dtype is half)
            or (needs[1] and other is not None and other.dtype is half)
        )
        ctx.settings = (temperature, reverse, reduction, core, early)
        if not early:
            ctx.save_for_backward(student, other, teacher, weight)
            return divergence_forward(core, student, other, teacher, weight, temperature, reverse, reduction)
        to_student = torch.empty_like(student) if needs[0] else None
        to_other = torch.empty_like(other) if needs[1] and other is not None else None
        to_teacher = torch.empty_like(teacher) if needs[2] else None
        raw = None
        if needs[3]:
            raw = torch.empty(row_shape(student), dtype=compute_dtype(result_dtype(student, other, teacher)))
        loss = divergence_forward(
            core,
            student,
            other,
            teacher,
            weight,
            temperature,
            reverse,
            reduction,
            (to_teacher, to_student, to_other),
            raw,
        )
        ctx.save_for_backward(student, other, teacher, weight, to_student, to_other, to_teacher, raw)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        temperature, reverse, reduction, core, early = ctx.settings
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or (not early and not eager(grad)):

            def reference(student: Tensor, other: Tensor | None, teacher: Tensor, weight: Tensor | None) -> Tensor:
                return divergence_reference(student, other, teacher, weight, temperature, reverse, reduction)

            return (*_library.differentiate_reference(reference, saved[:4], needs, grad), None, None, None, None)
        if not early:
            student, other, teacher, weight = saved
            gradients = divergence_backward(
                core, grad, student, other, teacher, weight, temperature, reverse, reduction, needs
            )
            return (*gradients, None, None, None, None)
        factor: Any = grad
        if eager(grad):
            factor = grad.item()
            if factor == 1.0 and saved[7] is None:
                return saved[4], saved[5], saved[6], None, None, None, None, None
        to_student, to_other, to_teacher = (None if x is None else (x * factor).to(x.dtype) for x in saved[4:7])
        scale = 1.0 / max(row_count(saved[0]), 1) if reduction == BATCHMEAN else 1.0
        return (
            to_student,
            to_other,
            to_teacher,
            weight_gradient(saved[7], grad, scale, saved[3]),
            None,
            None,
            None,
            None,
        )
