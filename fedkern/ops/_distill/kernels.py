"""The distill family's calls, and the launcher of the compiled cores."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkern.ops._core.backend import DTYPES, add_kernels, compute_dtype
from fedkern.ops._core.launch import Launcher
from fedkern.ops._core.memory import HUGE
from fedkern.ops._core.private_torch import graph_is_retained
from fedkern.ops._distill.reference import result_dtype
from fedkern.ops._distill.rows import BATCHMEAN, NONE, mean_scale, row_shape

# Operators as numbered in csrc/include/fedkern/distill.h
KL, LIMIT, ENTROPY = 0, 1, 2
# Operators as numbered in csrc/include/fedkern/distill_ensemble.h, after PROBS, LOGITS and MEAN
JS, CONSENSUS = 3, 4

# Makes a named tuple in half the time that its own constructor takes.
new_call = tuple.__new__


class Divergence(NamedTuple):
    """Arguments of kl_div, of dual_kl (with ``peer``, a second student), or of entropy (without a student).

    Attributes:
        weight: one value per row. A row of weight 0 contributes exactly 0, whatever it holds.
        reverse: KL(student ‖ teacher).
        reduction: a number of ``REDUCTIONS``.
    """

    student: Tensor | None
    peer: Tensor | None
    teacher: Tensor
    weight: Tensor | None
    temperature: float
    reverse: bool
    reduction: int


class Ensemble(NamedTuple):
    """A call of ensemble_kl, or, without a student, of js_div or consensus.

    Attributes:
        teachers: logits ``[K, B, C, *positions]``; those of js_div and consensus.
        weights: of ensemble_kl ``[K, B, 1, *positions]`` (one per teacher and row), ``[K, B, C, *positions]`` or short
            ones ``[K]``; of js_div and consensus ``[K, B, *positions]``. Any strides (0 where they were broadcast), not
            normalised, any floating dtype; None for equal weights.
        class_mask: bool ``[K, C]`` or None.
        mix: ``PROBS``, ``LOGITS``, ``MEAN``, ``JS`` or ``CONSENSUS``.
        log_probs: teachers hold log-probabilities.
        reduction: a number of ``REDUCTIONS``.
    """

    student: Tensor | None
    teachers: Tensor
    weights: Tensor | None
    class_mask: Tensor | None
    temperature: float
    mix: int
    log_probs: bool
    reduction: int


def entropy_call(logits: Tensor, reduction: int) -> Divergence:
    return new_call(Divergence, (None, None, logits, None, 1.0, False, reduction))


def js_call(logits: Tensor, weights: Tensor | None, reduction: int) -> Ensemble:
    return new_call(Ensemble, (None, logits, weights, None, 1.0, JS, False, reduction))


def consensus_call(logits: Tensor, weights: Tensor | None, reduction: int) -> Ensemble:
    return new_call(Ensemble, (None, logits, weights, None, 1.0, CONSENSUS, False, reduction))


# Of student, peer and teacher, or of student, teachers and weights; None where not wanted.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_GRADIENTS: Gradients = (None, None, None)
Pair = tuple[Tensor | None, Tensor | None]

# Looked up once: at 64 rows the code around a loss takes longer than the loss.
_empty, _empty_like = torch.empty, torch.empty_like

# Templates for empty_like, which takes two thirds of the time of empty(()).
_SCALARS = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in DTYPES}

_LARGE = HUGE // 8  # elements; fresh() compares bytes

# CUDA: rows that one block takes alone, and classes up to which it does (csrc/cuda/distill_run.cuh).
_ROWS, _CLASSES = 64, 128
# CUDA: most rows of an ensemble computed at a time, by threads per row (csrc/cuda/distill_ensemble.cu): about as many
# as the largest GPUs have room for. The numbers that a row keeps for each teacher are in the call's workspace.
_SLOTS = {1: 1 << 16, 32: 1 << 14, 256: 1 << 11}
# CUDA: classes up to which one thread takes a row of an ensemble, and from which a block does.
_FEW, _MANY = 4, 1024
# CUDA: classes from which on four numbers per row and teacher are kept: at most a quarter of the logits in float32.
_KEPT = 16


class DistillKernels(Launcher):
    """The distill operators of ``fedkern._cpu`` and ``fedkern._cuda``, also the base of Triton's launcher.

    Logits are ``[B, C, *positions]``, those of K teachers ``[K, B, C, *positions]``, and rows are ``[B, *positions]``,
    of any strides. Sums and losses are computed in float32 (float64 where an input is float64) and rounded once. A
    gradient has the memory format of its tensor. ``reduction`` is a number of ``REDUCTIONS``; "batchmean" divides loss
    and gradients by the number of rows, and an empty batch gives 0.

    If :attr:`fused` or :meth:`ensemble_fused` is true and the result is a scalar, autograd has the forward pass compute
    gradients for a grad_output of 1, into ``gradients``, and calls :meth:`scale_gradients` in the backward pass.
    Otherwise it calls ``..._backward``, which recomputes from the logits. On CUDA no method may read a tensor's values
    on the host.

    Weights of ensemble_kl may also be ``[K]`` if :attr:`short_weights` is true, unless they require a gradient.

    On the CPU a row's gradient costs little while the row is in the cache. On a GPU reading grad_output would wait, and
    reading, scaling and writing a gradient takes as much traffic as computing it from the logits, except for a student
    beside K teachers. The numbers that a gradient needs of a whole row (``statistics``) are few and can be kept.
    """

    # The cores read weights [K] for every row through a stride of 0, and have kernels of infinite temperature.
    short_weights = limits = True

    def __init__(self, core: ModuleType) -> None:
        super().__init__(core)
        self.fused = self.sparse = not self.gpu
        self.keeps = self.gpu
        self._distill = core.distill
        self._distill_ensemble = core.distill_ensemble

    def scale_gradients(self, gradients: tuple[Tensor | None, ...], grad: Tensor) -> tuple[Tensor | None, ...] | None:
        """Return ``gradients`` (computed for a grad_output of 1) times the scalar ``grad``.

        A GPU scales them in place, unless the graph is retained. None makes the caller use ``..._backward``: 16-bit
        gradients would be rounded twice and underflow before a loss scale lifts them.
        """
        if self.gpu:
            times = torch.mul if graph_is_retained() else Tensor.mul_
            return tuple([x if x is None else times(x, grad) for x in gradients])
        factor = grad.item()
        if factor == 1.0:
            return gradients
        for x in gradients:
            if x is not None and x.element_size() == 2:
                return None
        return tuple([x if x is None else x * factor for x in gradients])

    def empty_gradient(self, x: Tensor) -> Tensor:
        gradient = _empty_like(x)
        return gradient if gradient.numel() < _LARGE else self.fresh(gradient)

    def divergence_forward(
        self,
        call: Divergence,
        gradients: Gradients = NO_GRADIENTS,
        raw_loss: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> Tensor:
        """Compute kl_div, dual_kl or entropy.

        ``raw_loss`` receives the rows' unweighted losses, 0 where the weight is 0.
        """
        student, peer, teacher, _, _, _, reduction = call
        dtype = result_dtype(student, peer, teacher)
        if reduction == NONE or self.gpu:
            result = self._result(teacher, 0, dtype, reduction)
        else:  # _result's last line without a call, whose time shows at 64 rows
            result = _empty_like(_SCALARS[dtype])
        self._divergence(None, call, dtype, gradients, raw_loss, result, statistics)
        return result

    def divergence_statistics(self, call: Divergence) -> Tensor | None:
        """Allocate what divergence_forward keeps for divergence_backward, if anything."""
        if not self.keeps or call.temperature == math.inf:
            return None
        logits, dtype = call.teacher, compute_dtype(result_dtype(call.student, call.peer, call.teacher))
        numbers = 3 if call.student is None else 6 if call.peer is None else 10
        return _empty(logits.numel() // logits.shape[1] * numbers, dtype=dtype, device=logits.device)

    def divergence_backward(
        self, grads: Sequence[Tensor], call: Divergence, needs: Sequence[bool], statistics: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of student, peer, teacher and weight, in their dtypes, None where not needed.

        ``statistics`` give no gradient of the weight.
        """
        student, peer, teacher, weight, _, _, reduction = call
        to_student, to_peer, to_teacher = (
            self.empty_gradient(x) if need and x is not None else None
            for x, need in zip((student, peer, teacher), needs[:3], strict=True)
        )
        dtype = result_dtype(student, peer, teacher)
        raw = _empty(row_shape(teacher), dtype=compute_dtype(dtype), device=teacher.device) if needs[3] else None
        grad = grads[0].resolve_neg()  # bound to a name: its memory must outlive the call
        self._divergence(grad, call, dtype, (to_student, to_peer, to_teacher), raw, None, statistics)
        to_weight = None
        if raw is not None and weight is not None:
            to_weight = (raw * grad.to(raw.dtype) * mean_scale(teacher, reduction)).to(weight.dtype)
        return to_student, to_peer, to_teacher, to_weight

    def _divergence(
        self,
        grad: Tensor | None,
        call: Divergence,
        dtype: torch.dtype,
        gradients: Gradients,
        raw: Tensor | None,
        result: Tensor | None,
        statistics: Tensor | None,
    ) -> None:
        """Write the outputs that are not None, and ``statistics`` if there is no gradient (else read)."""
        student, peer, teacher, weight, temperature, reverse, reduction = call
        to_student, to_peer, to_teacher = gradients
        self._distill(
            ENTROPY if student is None else LIMIT if temperature == math.inf else KL,
            1 if dtype is torch.float64 else 0, teacher, temperature, reverse, None if reduction == BATCHMEAN else 1.0,
            0 if student is None else 1 if peer is None else 2, teacher, student, peer, to_teacher, to_student,
            to_peer, weight, grad, result if reduction == NONE else None,
            (raw, None if reduction == NONE else result, statistics), self._space(teacher) if self.gpu else None,
            self.at(teacher),
        )  # fmt: skip

    def ensemble_fused(self, student: Tensor | None, needs: Sequence[bool]) -> bool:
        """Return whether ensemble_forward computes the needed gradients of student, teachers and weights.

        On a GPU only the student's: reading all teachers again is several times its traffic. A 16-bit gradient would
        underflow before a loss scale lifts it.
        """
        if needs[2]:
            return False
        beside = needs[0] and not needs[1] and student is not None and student.element_size() > 2
        return self.fused or (self.keeps and beside)

    def ensemble_forward(
        self, call: Ensemble, gradients: Gradients = NO_GRADIENTS, statistics: Tensor | None = None
    ) -> Any:
        """Compute ensemble_kl, js_div, or consensus, which has two results."""
        student, teachers, _, _, _, mix, _, reduction = call
        dtype = result_dtype(student, None, teachers)
        by_class = student is not None and _by_class(call)
        result = self._result(teachers, 1, dtype, reduction)
        second_result = self._result(teachers, 1, dtype, reduction) if mix == CONSENSUS else None
        self._ensemble((None, None), call, dtype, by_class, gradients, (result, second_result), statistics)
        return result if second_result is None else (result, second_result)

    def ensemble_backward(
        self, grads: Sequence[Tensor], call: Ensemble, needs: Sequence[bool], statistics: Tensor | None = None
    ) -> Gradients:
        """Return the gradients of student, teachers and weights (in their given shape), None where not needed."""
        student, teachers, weights = call.student, call.teachers, call.weights
        dtype, by_class = result_dtype(student, None, teachers), _by_class(call)
        grad0, grad1 = (*[grad.resolve_neg() for grad in grads], None)[:2]
        to_student = self.empty_gradient(student) if needs[0] and student is not None else None
        to_teachers = self.empty_gradient(teachers) if needs[1] else None
        to_weights = None
        if needs[2] and weights is not None:
            # One gradient per class also where only the mask differs by class: the kernel then works by class.
            shape = (*weights.shape[:2], teachers.shape[2], *weights.shape[3:]) if by_class else weights.shape
            to_weights = _empty(shape, dtype=compute_dtype(dtype), device=weights.device)
        gradients = (to_student, to_teachers, to_weights)
        self._ensemble((grad0, grad1), call, dtype, by_class, gradients, (None, None), statistics)
        if to_weights is not None and weights is not None:
            if to_weights.shape != weights.shape:
                to_weights = to_weights.sum(2, keepdim=True)
            to_weights = to_weights.to(weights.dtype)
        return to_student, to_teachers, to_weights

    def _ensemble(
        self,
        grads: Pair,
        call: Ensemble,
        dtype: torch.dtype,
        by_class: bool,
        gradients: Gradients,
        results: Pair,
        statistics: Tensor | None,
    ) -> None:
        """Write the outputs that are not None, and ``statistics`` as in :meth:`_divergence`."""
        student, teachers, weights, class_mask, temperature, mix, log_probs, reduction = call
        to_student, to_teachers, to_weights = gradients
        (grad, second_grad), (result, second_result) = grads, results
        self._distill_ensemble(
            mix, temperature == math.inf, log_probs and temperature == 1.0, by_class,
            1 if dtype is torch.float64 else 0, teachers, temperature, None if reduction == BATCHMEAN else 1.0, student,
            teachers, weights, class_mask, to_student, to_teachers, to_weights, grad, second_grad,
            (reduction == NONE, result, second_result, statistics), self._stack_space(teachers) if self.gpu else None,
            self.at(teachers),
        )  # fmt: skip

    def stack_statistics(self, logits: Tensor, mix: int) -> Tensor | None:
        """Allocate what js_div and consensus keep for the backward pass.

        None where it would be large beside the logits, on a GPU in float64, and for js_div on the CPU.
        """
        count, batch, classes, *positions = logits.shape
        if self.gpu:
            if not self.keeps or classes < _KEPT or logits.dtype is torch.float64:
                return None
            return _empty((batch, *positions, 4 * count), dtype=torch.float32, device=logits.device).movedim(-1, 1)
        # Per row: four numbers for each of the K, then the log of the mixture. The last layout has rows side by side,
        # where the core takes them side by side.
        numbers, dtype = 4 * count + classes, compute_dtype(logits.dtype)
        if mix != CONSENSUS or 2 * numbers > count * classes:  # not much less to read than the logits
            return None
        if classes >= 24 and not positions:
            return torch.empty((batch, numbers), dtype=dtype, device="cpu")
        return torch.empty((numbers, batch, *positions), dtype=dtype, device="cpu").transpose(0, 1)

    def _result(self, logits: Tensor, batch: int, dtype: torch.dtype, reduction: int) -> Tensor:
        if reduction == NONE:
            shape = logits.shape[batch : batch + 1] + logits.shape[batch + 2 :]
            return _empty(shape, dtype=dtype, device=logits.device)
        return _empty((), dtype=dtype, device=logits.device) if self.gpu else _empty_like(_SCALARS[dtype])

    def _space(self, logits: Tensor) -> Tensor | None:
        """Allocate sums between a GPU's blocks, unless one block computes the call alone."""
        classes = logits.shape[1]
        if classes <= _CLASSES and logits.numel() <= _ROWS * classes:
            return None
        return _empty(self.core.distill_workspace, dtype=torch.float64, device=logits.device)

    def _stack_space(self, teachers: Tensor) -> Tensor:
        core, count = self.core, teachers.shape[0]
        slots = max(core.ensemble_slots, min(teachers.numel() // (count * teachers.shape[2]), _SLOTS[_lanes(teachers)]))
        size = core.ensemble_totals + slots * core.ensemble_numbers * count
        return _empty(size, dtype=torch.float64, device=teachers.device)


def _by_class(call: Ensemble) -> bool:
    weights, dims = call.weights, call.teachers.dim()
    return call.class_mask is not None or (weights is not None and weights.dim() == dims and weights.shape[2] > 1)


def _lanes(teachers: Tensor) -> int:
    classes = teachers.shape[2]
    if classes <= _FEW or (classes < _MANY and teachers.stride(2) != 1):
        return 1
    return 32 if classes < _MANY else 256


for _name, _check in (
    *[(name, "logits_fit") for name in ("kl_div", "dual_kl", "entropy")],
    *[(name, "tensors_fit") for name in ("ensemble_kl", "js_div", "consensus")],
):
    add_kernels(
        _name, cpu=DistillKernels, cuda=DistillKernels, triton="_distill.triton.distill:TritonDistill",
        triton_leaves="infinite temperatures" if "kl" in _name else "", fits=_check,
    )  # fmt: skip
