"""kl_div, dual_kl: Kullback-Leibler divergence between the softmaxes of one or two students and a teacher.

The reference is in reference.py, the operators for compilers are in entries.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core import library
from fedkern.ops._core.backend import compute_dtype, eager, readable, ready
from fedkern.ops._core.checks import autocast
from fedkern.ops._core.function import EagerFunction, handed_out, saved_tensors
from fedkern.ops._distill.checks import check_logits, check_reduction, check_temperature, check_weight, move_classes
from fedkern.ops._distill.entries import DIVERGENCE, select_at
from fedkern.ops._distill.kernels import DistillKernels, Divergence, new_call
from fedkern.ops._distill.reference import FLAT, divergence_reference, result_dtype
from fedkern.ops._distill.rows import NONE, REDUCTIONS, mean_scale, row_shape


def kl_div(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    dim: int = 1,
) -> Tensor:
    """Return ``T² · KL(softmax(teacher / T) ‖ softmax(student / T))`` over the classes, which lie on axis ``dim``.

    The distillation loss of Hinton et al. (arXiv 1503.02531). As in PyTorch's losses the classes lie on axis 1; give
    ``dim=-1`` for logits ``[B, T, V]`` of a language model. Exchange student and teacher for the other direction.

    Args:
        student: logits ``[B, C]`` or ``[B, C, *positions]``; float32, float64, bfloat16 or float16, any strides.
        teacher: logits of the same shape; its dtype may differ.
        temperature: T > 0, in the units of the logits. ``math.inf`` is the exact limit: half the variance over classes
            of ``teacher - student``. Above 64 every backend takes the reference, in float64, which keeps all digits.
        weight: ``[B]`` or ``[B, *positions]``, floating or bool; multiplies each row's loss. A row of weight 0
            contributes exactly zero to the loss and to every gradient, whatever it holds.
        reduction: ``"none"`` (one value per row), ``"sum"``, or ``"batchmean"`` (the sum divided by the number of rows,
            B × positions; 0 for an empty batch).
        dim: axis of the classes, which may be negative. The other axes are B and the positions, in their order. No
            copy is made.

    Returns:
        ``[B, *positions]`` for ``"none"``, else a scalar, in the promoted dtype of student and teacher. Everything is
        computed in float32 (float64 where an input is float64) and rounded once. Under autocast 16-bit
        logits count as float32.

    Gradients go to those of student, teacher and weight that require one, each in its own dtype. A class whose teacher
    probability is 0 (a logit of ``-inf``, or so low that the exponential underflows, as that of a class masked with a
    large finite number) contributes nothing to the teacher's side and gets no gradient there. A class that is ``-inf``
    in the student and has a teacher probability makes the loss ``+inf``. With ``temperature=math.inf`` classes
    that are ``-inf`` in either are left out.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device, the temperature or the reduction is wrong.
    """
    return _dispatch(student, None, teacher, weight, temperature, False, reduction, dim, ("student", "teacher"))


def dual_kl(
    a: Tensor,
    b: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    direction: str = "teacher",
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    dim: int = 1,
) -> Tensor:
    """Return the sum of two divergences over the classes, which lie on axis ``dim``, from one reading of the teacher.

    The distillation loss of FedGID (arXiv 2504.00850).

    - ``direction="teacher"``: ``T² (KL(teacher ‖ a) + KL(teacher ‖ b))``
    - ``direction="student"``: ``T² (KL(a ‖ teacher) + KL(b ‖ teacher))``

    Each name stands for its softmax at temperature T. Temperature, reduction, dim, results, gradients and errors are
    those of :func:`kl_div`.

    Args:
        a, b, teacher: logits of one shape, as in :func:`kl_div`; a and b are two students.
        direction: whose probabilities weight the logarithms.
        weight: as in :func:`kl_div`; multiplies both divergences of a row.
    """
    if direction not in ("teacher", "student"):
        raise ValueError(f'direction must be "teacher" or "student", but is {direction!r}')
    reverse = direction == "student"
    return _dispatch(a, b, teacher, weight, temperature, reverse, reduction, dim, ("a", "b", "teacher"))


def _dispatch(
    student: Tensor,
    other: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: str,
    dim: int,
    names: tuple[str, ...],
) -> Tensor:
    student, other, teacher = autocast(student, other, teacher)
    # By the number of names: None as the second student of dual_kl is a mistake, which check_logits reports.
    tensors: tuple[Any, ...] = (student, teacher) if len(names) == 2 else (student, other, teacher)
    if type(dim) is not int or dim != 1:
        tensors = move_classes(names, tensors, dim, (0,) * len(names))
        student, teacher = tensors[0], tensors[-1]
        other = tensors[1] if len(names) == 3 else None
    operator = "kl_div" if len(names) == 2 else "dual_kl"
    kernel = ready(operator, *tensors)
    if kernel is None:
        check_logits(names, tensors)
    if type(temperature) is not float or not temperature > 0:
        temperature = check_temperature(temperature)
    code = REDUCTIONS.get(reduction) if type(reduction) is str else None
    if code is None:
        code = check_reduction(reduction)
    if weight is not None:
        weight = check_weight(weight, student, torch.float32)
        tensors = (*tensors, weight)
        if not eager(weight) or weight.is_neg():
            kernel = None
    if kernel is None or temperature > FLAT:
        if not eager(*tensors):
            return DIVERGENCE(student, other, teacher, weight, temperature, reverse, code)
        kernel = select_at(temperature, operator, *tensors)
    if kernel is None:
        return divergence_reference(student, other, teacher, weight, temperature, reverse, code)
    call = new_call(Divergence, (student, other, teacher, weight, temperature, reverse, code))
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return _Divergence.call((kernel, call), *tensors)
    return kernel.divergence_forward(call)


class _Divergence(EagerFunction):
    """kl_div and dual_kl with their gradients for eager calls.

    Where the kernel is ``fused``, the forward pass also computes the gradients for a grad_output of 1, while the row is
    cached. With reduction "none", whose grad_output is rarely 1, and where the kernel is not fused, the backward pass
    computes them from the logits, and from what the forward pass kept.

    The tensors and their gradients are (student, [other], teacher, [weight]).
    """

    @staticmethod
    def forward(ctx: Any, how: tuple[DistillKernels, Divergence], *tensors: Tensor) -> Tensor:
        kernel, call = how
        student, other, teacher, weight, _, _, reduction = call
        dual = other is not None
        ctx.how = kernel, call[4:], dual  # without tensors, which autograd keeps
        recompute = reduction == NONE or not kernel.fused
        needs = ctx.needs_input_grad[1:]
        if not recompute and weight is None:
            # The general case below without its lists and loops, whose time shows at 64 rows.
            to_student = kernel.empty_gradient(tensors[0]) if needs[0] else None
            to_teacher = kernel.empty_gradient(teacher) if needs[-1] else None
            to_other = None
            if dual:
                to_other = kernel.empty_gradient(tensors[1]) if needs[1] else None
                ctx.save_for_backward(student, other, teacher, to_student, to_other, to_teacher)
            else:
                ctx.save_for_backward(student, teacher, to_student, to_teacher)
            return kernel.divergence_forward(call, (to_student, to_other, to_teacher))
        if recompute:
            to_weight = weight is not None and needs[-1]
            statistics = None if to_weight else kernel.divergence_statistics(call)
            ctx.save_for_backward(*tensors, statistics)
            return kernel.divergence_forward(call, statistics=statistics)
        logits = 3 if dual else 2
        gradients = [
            kernel.empty_gradient(x) if need else None for x, need in zip(tensors[:logits], needs, strict=False)
        ]
        raw = None
        if weight is not None:
            if needs[logits]:
                dtype = compute_dtype(result_dtype(student, other, teacher))
                raw = torch.empty(row_shape(teacher), dtype=dtype, device=teacher.device)
            gradients.append(raw)
        to_other = gradients[1] if dual else None
        ctx.save_for_backward(*tensors, *gradients)
        return kernel.divergence_forward(call, (gradients[0], to_other, gradients[logits - 1]), raw)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = saved_tensors(ctx)
        count = len(ctx.needs_input_grad) - 1
        if not readable(grad):
            return (None, *_backward_through_graph(ctx, saved[:count], grad))
        kernel, (_, _, reduction), dual = ctx.how
        if reduction == NONE or not kernel.fused:
            return (None, *_backward_from_logits(ctx, saved[:count], grad, saved[count]))
        gradients = kernel.scaled(saved[count:], grad)
        if gradients is None:
            return (None, *_backward_from_logits(ctx, saved[:count], grad))
        logits = 3 if dual else 2
        if count > logits and gradients[logits] is not None:
            scaled = gradients[logits] * mean_scale(saved[0], reduction)
            gradients = (*gradients[:logits], scaled.to(saved[logits].dtype))
        return (None, *handed_out(gradients, saved[count:]))


def _spread(tensors: Sequence[Tensor], dual: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(student, [other], teacher, [weight]) as four, with None for a missing one."""
    logits = 3 if dual else 2
    weight = tensors[logits] if len(tensors) > logits else None
    return tensors[0], tensors[1] if dual else None, tensors[logits - 1], weight


def _backward_through_graph(ctx: Any, tensors: Sequence[Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the reference with a graph of their own, to be differentiated again or mapped over."""
    _, settings, dual = ctx.how

    def reference(*inputs: Tensor) -> Tensor:
        return divergence_reference(*_spread(inputs, dual), *settings)

    return library.differentiate_reference(reference, tensors, ctx.needs_input_grad[1:], grad)


def _backward_from_logits(
    ctx: Any, tensors: Sequence[Tensor], grad: Tensor, statistics: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    kernel, settings, dual = ctx.how
    call = Divergence(*_spread(tensors, dual), *settings)
    weighted, needs = call.weight is not None, ctx.needs_input_grad[1:]
    full = (needs[0], dual and needs[1], needs[2 if dual else 1], weighted and needs[-1])
    gradients = kernel.divergence_backward((grad,), call, full, statistics)
    return tuple(x for x, present in zip(gradients, (True, dual, True, weighted), strict=True) if present)
