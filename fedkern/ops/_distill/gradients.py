"""Autograd functions of the distill family.

The forward pass of a ``fused`` kernel also computes the gradients for a grad_output of 1, while the row is cached.
Otherwise, and with reduction "none", whose grad_output is rarely 1, the backward pass computes them.
"""

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import DTYPES, compute_dtype, is_readable
from fedkern.ops._core.library import Context, EagerFunction, differentiate_reference, handed_out, saved_tensors
from fedkern.ops._distill.checks import spread_weights
from fedkern.ops._distill.ensemble_reference import consensus_reference, ensemble_reference, js_reference
from fedkern.ops._distill.kernels import CONSENSUS, JS, DistillKernels, Divergence, Ensemble
from fedkern.ops._distill.reference import divergence_reference, entropy_rows_reference, result_dtype
from fedkern.ops._distill.rows import NONE, mean_scale, row_shape

Gradients = tuple[Tensor | None, ...]


class DivergenceFunction(EagerFunction):
    @staticmethod
    def forward(
        ctx: Context,
        kernel_and_call: tuple[DistillKernels, Divergence],
        student: Tensor | None,
        peer: Tensor | None,
        teacher: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        kernel, call = kernel_and_call
        ctx.settings = kernel, call[4:]  # without tensors, which autograd keeps
        _, need_student, need_peer, need_teacher, need_weight = ctx.needs_input_grad
        if call.reduction == NONE or not kernel.fused:
            statistics = None if need_weight else kernel.divergence_statistics(call)
            ctx.save_for_backward(student, peer, teacher, weight, statistics)
            return kernel.divergence_forward(call, statistics=statistics)
        # One by one: the time of a loop shows at 64 rows.
        to_student = kernel.empty_gradient(student) if need_student and student is not None else None
        to_peer = kernel.empty_gradient(peer) if need_peer and peer is not None else None
        to_teacher = kernel.empty_gradient(teacher) if need_teacher else None
        losses = None
        if need_weight:
            dtype = compute_dtype(result_dtype(student, peer, teacher))
            losses = torch.empty(row_shape(teacher), dtype=dtype, device=teacher.device)
        ctx.save_for_backward(student, peer, teacher, weight, None, to_student, to_peer, to_teacher, losses)
        return kernel.divergence_forward(call, (to_student, to_peer, to_teacher), losses)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        student, peer, teacher, weight, statistics, *taken = saved_tensors(ctx)
        kernel, settings = ctx.settings
        needs = ctx.needs_input_grad[1:]
        if not is_readable(grad):
            tensors = (student, peer, teacher, weight)
            return (None, *differentiate_reference(lambda *some: _divergence(*some, *settings), tensors, needs, grad))
        if taken and (scaled := kernel.scale_gradients(tuple(taken), grad)) is not None:
            *gradients, losses = handed_out(scaled, taken)
            to_weight = None if losses is None else (losses * mean_scale(teacher, settings[-1])).to(weight.dtype)
            return (None, *gradients, to_weight)
        call = Divergence(student, peer, teacher, weight, *settings)
        return (None, *kernel.divergence_backward((grad,), call, needs, statistics))


class EnsembleFunction(EagerFunction):
    """Losses on an :class:`Ensemble`.

    The backward pass computes all gradients if weights require one, and for consensus: only there both grad_outputs are
    known.
    """

    @staticmethod
    def forward(
        ctx: Context,
        kernel_and_call: tuple[DistillKernels, Ensemble],
        student: Tensor | None,
        teachers: Tensor,
        weights: Tensor | None,
        class_mask: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        kernel, call = kernel_and_call
        ctx.settings = kernel, call[4:]  # without tensors, which autograd keeps
        ctx.set_materialize_grads(call.mix != CONSENSUS)
        need_student, need_teachers, need_weights = needs = ctx.needs_input_grad[1:4]
        if call.reduction == NONE or call.mix == CONSENSUS or not kernel.ensemble_fused(student, needs):
            statistics = kernel.stack_statistics(teachers, call.mix) if student is None and not need_weights else None
            ctx.save_for_backward(student, teachers, weights, class_mask, statistics)
            result: Tensor | tuple[Tensor, Tensor] = kernel.ensemble_forward(call, statistics=statistics)
            return result
        to_student = kernel.empty_gradient(student) if need_student and student is not None else None
        to_teachers = kernel.empty_gradient(teachers) if need_teachers else None
        ctx.save_for_backward(student, teachers, weights, class_mask, None, to_student, to_teachers)
        fused: Tensor | tuple[Tensor, Tensor] = kernel.ensemble_forward(call, (to_student, to_teachers, None))
        return fused

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> Gradients:
        student, teachers, weights, class_mask, statistics, *taken = saved_tensors(ctx)
        kernel, settings = ctx.settings
        needs = ctx.needs_input_grad[1:4]
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * 5
        is_plain = all(map(is_readable, given))
        results = [_zero(given[0], is_plain) if grad is None else grad for grad in grads]
        if not is_plain:
            constants, tensors = (class_mask, *settings), (student, teachers, weights)
            gradients = differentiate_reference(lambda *inputs: _ensemble(*inputs, *constants), tensors, needs, results)
            return (None, *gradients, None)
        if taken and (scaled := kernel.scale_gradients(tuple(taken), results[0])) is not None:
            return (None, *handed_out(scaled, taken), None, None)
        call = Ensemble(student, teachers, weights, class_mask, *settings)
        return (None, *kernel.ensemble_backward(results, call, needs, statistics), None)


def _divergence(*arguments: Any) -> Tensor:
    call = Divergence(*arguments)
    if call.student is None:
        return entropy_rows_reference(call.teacher, call.reduction)
    return divergence_reference(call.student, *call[1:])


def _ensemble(*arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    student, teachers, weights, *_ = call = Ensemble(*arguments)
    if student is None:
        return (js_reference if call.mix == JS else consensus_reference)(teachers, weights, call.reduction)
    if weights is not None and weights.dim() == 1:
        weights = spread_weights(weights, teachers)
    return ensemble_reference(student, teachers, weights, *call[3:])


# Zero grad_outputs for a scalar result that is not used: zeros made by autograd take a microsecond each.
_ZEROS = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in DTYPES}


def _zero(grad: Tensor, is_plain: bool) -> Tensor:
    return _ZEROS[grad.dtype] if is_plain and grad.dim() == 0 and grad.is_cpu else torch.zeros_like(grad)
