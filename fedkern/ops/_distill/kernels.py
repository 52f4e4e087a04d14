"""The distill family's settings, and the launcher of the compiled cores."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import DTYPES, compute_dtype, serve
from fedkern.ops._core.launch import Launcher
from fedkern.ops._core.memory import HUGE
from fedkern.ops._core.private_torch import graph_is_retained
from fedkern.ops._distill.reference import result_dtype
from fedkern.ops._distill.rows import BATCHMEAN, NONE, mean_scale, row_shape

# --- settings: one object per call instead of several arguments. The cached constructors cost eager calls nothing.


@dataclass(frozen=True, slots=True)
class Divergence:
    """Settings of kl_div and dual_kl. ``reverse``: KL(student ‖ teacher); ``reduction``: a number of ``REDUCTIONS``."""

    temperature: float
    reverse: bool
    reduction: int


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Settings of ensemble_kl. ``mix``: ``PROBS``, ``LOGITS`` or ``MEAN``.

    ``log_probs``: teachers hold log-probabilities.
    """

    temperature: float
    mix: int
    log_probs: bool
    reduction: int


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

divergence_settings = functools.lru_cache(maxsize=256)(Divergence)
ensemble_settings = functools.lru_cache(maxsize=256)(Ensemble)


# Operators as numbered in csrc/include/fedkern/distill.h
KL, LIMIT, ENTROPY = 0, 1, 2
# Operators as numbered in csrc/include/fedkern/distill_ensemble.h, after PROBS, LOGITS and MEAN
JS, CONSENSUS = 3, 4

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
    """The distill operators of ``fedkern._cpu`` and ``fedkern._cuda``; Triton's launcher overrides what calls a core.

    The public functions have checked the arguments.  Kernels allocate what they return.  Sums and losses are computed
    in float32 (float64 where an input is float64) and rounded once.

    Shapes: logits are ``[B, C, *positions]``, those of K teachers ``[K, B, C, *positions]``, and rows are
    ``[B, *positions]``. Any strides are valid. A gradient has the memory format of its tensor.

    ``reduction`` is a number of ``REDUCTIONS``. "none" gives a value per row, the others a scalar. "batchmean" divides
    loss and gradients by the number of rows; an empty batch gives 0.

    Gradients for a grad_output of 1 can be computed in the forward pass, into the ``to_...`` tensors. Autograd asks for
    this where :attr:`fused` or :meth:`ensemble_fused` is true and the result is a scalar, and then calls :meth:`scaled`
    in the backward pass.
    Otherwise it gives no ``to_...`` tensors and calls ``..._backward``, which recomputes from the logits and takes
    ``grad`` as a tensor of the result's shape, any strides. On CUDA the kernel reads ``grad`` through its device
    pointer: no method there may read a tensor's values on the host.

    Weights of ensemble_kl may also be ``[K]`` where :attr:`short_weights` is true, unless they want a gradient.

    On the CPU a row's gradient costs little while the row is in the cache, and the host can read grad_output: the
    forward pass computes gradients too.  On a GPU reading grad_output would wait for the device. A gradient from the
    forward pass has to be read, scaled and written again, as much traffic as computing it from the logits. What
    a gradient needs of its row as a whole is little, and can be kept: :meth:`divergence_kept`, :meth:`entropy_kept`,
    :meth:`stack_kept`. Only beside the logits of K teachers is a student's gradient little.
    """

    # The cores read weights [K] for every row through a stride of 0, and have kernels of infinite temperature.
    short_weights = limits = True

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        self.fused = not self.gpu
        self.keeps = self.gpu
        self._distill = core.distill
        self._distill_ensemble = core.distill_ensemble

    def scaled(self, gradients: tuple[Tensor | None, ...], grad: Tensor) -> tuple[Tensor | None, ...] | None:
        """Returns ``gradients`` (for a grad_output of 1) times the scalar ``grad``; called only where they were taken.

        Where ``grad`` is 1 these are the same tensors, otherwise new ones, since the graph may be retained; on a GPU,
        where nobody can look, the same ones if it is not. None makes the caller use ``..._backward`` instead. That is
        so for 16-bit gradients, which would be rounded twice and would underflow before a loss scale lifts them.
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
        """An uninitialised gradient of ``x`` in its memory format, for ``to_...``."""
        gradient = _empty_like(x)
        return gradient if gradient.numel() < _LARGE else self.fresh(gradient)

    def divergence_forward(
        self,
        student: Tensor,
        other: Tensor | None,
        teacher: Tensor,
        weight: Tensor | None,
        settings: Divergence,
        to_student: Tensor | None = None,
        to_other: Tensor | None = None,
        to_teacher: Tensor | None = None,
        raw_loss: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """kl_div, or dual_kl with ``other`` (a second student); the result has the promoted dtype of the logits.

        ``weight`` has one value per row. A row of weight 0 contributes exactly 0, whatever it holds. ``raw_loss``
        receives the rows' unweighted losses, 0 where the weight is 0.
        """
        dtype = result_dtype(student, other, teacher)
        result = self._result(student, dtype, settings.reduction)
        gradients = (to_student, to_other, to_teacher)
        self._divergence(None, student, other, teacher, weight, settings, dtype, gradients, raw_loss, result, kept)
        return result

    def divergence_kept(
        self, student: Tensor, other: Tensor | None, teacher: Tensor, settings: Divergence
    ) -> Tensor | None:
        """Uninitialised memory for what divergence_forward keeps for divergence_backward; None: keeps nothing."""
        if not self.keeps or settings.temperature == math.inf:
            return None
        dtype = compute_dtype(result_dtype(student, other, teacher))
        return self._kept(student, 6 if other is None else 10, dtype)

    def divergence_backward(
        self,
        grad: Tensor,
        student: Tensor,
        other: Tensor | None,
        teacher: Tensor,
        weight: Tensor | None,
        settings: Divergence,
        needs: Sequence[bool],
        kept: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of student, other, teacher, weight, each in its own dtype; None where ``needs`` is false.

        ``kept`` gives no gradient of the weight.
        """
        to_student, to_other, to_teacher = (
            self.empty_gradient(x) if need and x is not None else None
            for x, need in zip((student, other, teacher), needs[:3], strict=True)
        )
        dtype = result_dtype(student, other, teacher)
        raw = _empty(row_shape(student), dtype=compute_dtype(dtype), device=student.device) if needs[3] else None
        grad = grad.resolve_neg()  # bound to a name: its memory must outlive the call
        gradients = (to_student, to_other, to_teacher)
        self._divergence(grad, student, other, teacher, weight, settings, dtype, gradients, raw, None, kept)
        to_weight = None
        if raw is not None and weight is not None:
            to_weight = (raw * grad.to(raw.dtype) * mean_scale(student, settings.reduction)).to(weight.dtype)
        return to_student, to_other, to_teacher, to_weight

    def _divergence(
        self,
        grad: Tensor | None,
        student: Tensor,
        other: Tensor | None,
        teacher: Tensor,
        weight: Tensor | None,
        settings: Divergence,
        dtype: torch.dtype,
        gradients: Gradients,
        raw: Tensor | None,
        result: Tensor | None,
        kept: Tensor | None,
    ) -> None:
        """Writes the gradients, the rows' unweighted losses and the result, where they are not None.

        ``kept`` is written too where no gradient is, and else read.
        """
        temperature, reduction = settings.temperature, settings.reduction
        to_student, to_other, to_teacher = gradients
        self._distill(
            LIMIT if temperature == math.inf else KL,
            1 if dtype is torch.float64 else 0,
            student,
            temperature,
            settings.reverse,
            None if reduction == BATCHMEAN else 1.0,
            1 if other is None else 2,
            teacher,
            student,
            other,
            to_teacher,
            to_student,
            to_other,
            weight,
            grad,
            result if reduction == NONE else None,
            (raw, None if reduction == NONE else result, kept),
            self._space(student) if self.gpu else None,
            self.at(student),
        )

    def entropy_forward(
        self, logits: Tensor, reduction: int, to_logits: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """entropy, in the logits' dtype."""
        result = self._result(logits, logits.dtype, reduction)
        self._entropy(None, logits, reduction, to_logits, result, kept)
        return result

    def entropy_kept(self, logits: Tensor) -> Tensor | None:
        """As divergence_kept."""
        return self._kept(logits, 3, compute_dtype(logits.dtype)) if self.keeps else None

    def entropy_backward(self, grad: Tensor, logits: Tensor, reduction: int, kept: Tensor | None = None) -> Tensor:
        gradient = self.empty_gradient(logits)
        grad = grad.resolve_neg()
        self._entropy(grad, logits, reduction, gradient, None, kept)
        return gradient

    def _kept(self, logits: Tensor, numbers: int, dtype: torch.dtype) -> Tensor:
        return _empty(logits.numel() // logits.shape[1] * numbers, dtype=dtype, device=logits.device)

    def _entropy(
        self,
        grad: Tensor | None,
        logits: Tensor,
        reduction: int,
        gradient: Tensor | None,
        result: Tensor | None,
        kept: Tensor | None,
    ) -> None:
        self._distill(
            ENTROPY,
            1 if logits.dtype is torch.float64 else 0,
            logits,
            1.0,
            False,
            None if reduction == BATCHMEAN else 1.0,
            0,
            logits,
            None,
            None,
            gradient,
            None,
            None,
            None,
            grad,
            result if reduction == NONE else None,
            (None, None if reduction == NONE else result, kept),
            self._space(logits) if self.gpu else None,
            self.at(logits),
        )

    def ensemble_fused(self, student: Tensor, needs: Sequence[bool]) -> bool:
        """Whether ensemble_forward takes ``to_...`` for gradients of student, teachers, weights, where ``needs`` says.

        On a GPU the student's alone: reading all teachers again is several times its traffic, that of the teachers'
        own gradients no more than scaling them. One of 16 bits would underflow before a loss scale lifts it.
        """
        if needs[2]:
            return False
        return self.fused or (self.keeps and needs[0] and not needs[1] and student.element_size() > 2)

    def ensemble_forward(
        self,
        student: Tensor,
        teachers: Tensor,
        weights: Tensor | None,
        class_mask: Tensor | None,
        settings: Ensemble,
        to_student: Tensor | None = None,
        to_teachers: Tensor | None = None,
    ) -> Tensor:
        """ensemble_kl, in the promoted dtype of student and teachers.

        ``weights``: ``[K, B, 1, *positions]`` (one per teacher and row) or ``[K, B, C, *positions]``, any strides (0
        where they were broadcast), not normalised, any floating dtype; None for equal weights. ``class_mask``: bool
        ``[K, C]`` or None.
        """
        dtype = result_dtype(student, None, teachers)
        result = self._result(student, dtype, settings.reduction)
        by_class = class_mask is not None or (weights is not None and _by_class(weights))
        gradients = (to_student, to_teachers, None)
        self._ensemble(None, student, teachers, weights, class_mask, settings, dtype, by_class, gradients, result)
        return result

    def ensemble_backward(
        self,
        grad: Tensor,
        student: Tensor,
        teachers: Tensor,
        weights: Tensor | None,
        class_mask: Tensor | None,
        settings: Ensemble,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of student, teachers, weights (in the shape given); None where ``needs`` is false."""
        dtype = result_dtype(student, None, teachers)
        by_class = class_mask is not None or (weights is not None and _by_class(weights))
        grad = grad.resolve_neg()
        to_student = self.empty_gradient(student) if needs[0] else None
        to_teachers = self.empty_gradient(teachers) if needs[1] else None
        to_weights = None
        if needs[2] and weights is not None:
            # One gradient per class also where only the mask differs by class: the kernel then works by class.
            shape = (*weights.shape[:2], teachers.shape[2], *weights.shape[3:]) if by_class else weights.shape
            to_weights = _empty(shape, dtype=compute_dtype(dtype), device=weights.device)
        gradients = (to_student, to_teachers, to_weights)
        self._ensemble(grad, student, teachers, weights, class_mask, settings, dtype, by_class, gradients, None)
        if to_weights is not None and weights is not None:
            if to_weights.shape != weights.shape:
                to_weights = to_weights.sum(2, keepdim=True)
            to_weights = to_weights.to(weights.dtype)
        return to_student, to_teachers, to_weights

    def _ensemble(
        self,
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
        """Writes the gradients of student, teachers and weights, and the result, where they are not None."""
        temperature = settings.temperature
        to_student, to_teachers, to_weights = gradients
        self._distill_ensemble(
            settings.mix,
            temperature == math.inf,
            settings.log_probs and temperature == 1.0,
            by_class,
            1 if dtype is torch.float64 else 0,
            teachers,
            temperature,
            None if settings.reduction == BATCHMEAN else 1.0,
            student,
            teachers,
            weights,
            class_mask,
            to_student,
            to_teachers,
            to_weights,
            grad,
            None,
            (settings.reduction == NONE, result, None),
            self._stack_space(teachers) if self.gpu else None,
            self.at(teachers),
        )

    def js_forward(
        self,
        logits: Tensor,
        weights: Tensor | None,
        reduction: int,
        to_logits: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """js_div, in the logits' dtype. ``weights``: ``[K, B, *positions]`` or None, as in ensemble_forward."""
        result = self._stack_result(logits, reduction)
        self._run_stack(JS, logits, weights, reduction, to_logits, None, (), result, None, kept)
        return result

    def js_backward(
        self,
        grad: Tensor,
        logits: Tensor,
        weights: Tensor | None,
        reduction: int,
        needs: Sequence[bool],
        kept: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of logits and weights; None where ``needs`` is false."""
        return self._stack_backward(JS, (grad,), logits, weights, reduction, needs, kept)

    def stack_kept(self, logits: Tensor) -> Tensor | None:
        """CUDA: uninitialised memory for what js_forward and consensus_forward keep for the backward pass.

        None: they keep nothing, where that were much beside the logits, and in float64.
        """
        count, batch, classes, *positions = logits.shape
        if not self.keeps or classes < _KEPT or logits.dtype is torch.float64:
            return None
        kept = _empty((batch, *positions, 4 * count), dtype=torch.float32, device=logits.device)
        return kept.movedim(-1, 1)

    def consensus_kept(self, logits: Tensor) -> Tensor | None:
        """Uninitialised memory for results that consensus_forward keeps for consensus_backward; None: keeps nothing."""
        if self.gpu:
            return self.stack_kept(logits)
        # Per row: four numbers for each of the K, then the log of the mixture. The last layout has rows side by side,
        # where the core takes them side by side.
        count, batch, classes, *positions = logits.shape
        numbers, dtype = 4 * count + classes, compute_dtype(logits.dtype)
        if 2 * numbers > count * classes:  # not much less to read than the logits
            return None
        if classes >= 24 and not positions:
            return torch.empty((batch, numbers), dtype=dtype, device="cpu")
        return torch.empty((numbers, batch, *positions), dtype=dtype, device="cpu").transpose(0, 1)

    def consensus_forward(
        self, logits: Tensor, weights: Tensor | None, reduction: int, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """consensus: (entropy of the mixture, weighted mean of the entropies)."""
        first, second = self._stack_result(logits, reduction), self._stack_result(logits, reduction)
        self._run_stack(CONSENSUS, logits, weights, reduction, None, None, (), first, second, kept)
        return first, second

    def consensus_backward(
        self,
        grad_mixture: Tensor,
        grad_mean: Tensor,
        logits: Tensor,
        weights: Tensor | None,
        reduction: int,
        needs: Sequence[bool],
        kept: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of logits and weights; None where ``needs`` is false."""
        return self._stack_backward(CONSENSUS, (grad_mixture, grad_mean), logits, weights, reduction, needs, kept)

    def _stack_backward(
        self,
        kind: int,
        grads: tuple[Tensor, ...],
        logits: Tensor,
        weights: Tensor | None,
        reduction: int,
        needs: Sequence[bool],
        kept: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        to_logits = self.empty_gradient(logits) if needs[0] else None
        to_weights = None
        if needs[1] and weights is not None:
            to_weights = _empty(weights.shape, dtype=compute_dtype(logits.dtype), device=logits.device)
        grads = tuple([grad.resolve_neg() for grad in grads])
        self._run_stack(kind, logits, weights, reduction, to_logits, to_weights, grads, None, None, kept)
        return to_logits, to_weights if weights is None or to_weights is None else to_weights.to(weights.dtype)

    def _run_stack(
        self,
        kind: int,
        logits: Tensor,
        weights: Tensor | None,
        reduction: int,
        to_logits: Tensor | None,
        to_weights: Tensor | None,
        grads: tuple[Tensor, ...],
        first: Tensor | None,
        second: Tensor | None,
        kept: Tensor | None = None,
    ) -> None:
        self._distill_ensemble(
            kind,
            False,
            False,
            False,
            1 if logits.dtype is torch.float64 else 0,
            logits,
            1.0,
            None if reduction == BATCHMEAN else 1.0,
            None,
            logits,
            weights,
            None,
            None,
            to_logits,
            to_weights,
            grads[0] if grads else None,
            grads[1] if len(grads) > 1 else None,
            (reduction == NONE, first, second, kept),
            self._stack_space(logits) if self.gpu else None,
            self.at(logits),
        )

    def _result(self, rows_of: Tensor, dtype: torch.dtype, reduction: int) -> Tensor:
        if reduction == NONE:
            return _empty(row_shape(rows_of), dtype=dtype, device=rows_of.device)
        return _empty((), dtype=dtype, device=rows_of.device) if self.gpu else _empty_like(_SCALARS[dtype])

    def _stack_result(self, logits: Tensor, reduction: int) -> Tensor:
        if reduction == NONE:
            return _empty(logits.shape[1:2] + logits.shape[3:], dtype=logits.dtype, device=logits.device)
        return self._result(logits, logits.dtype, reduction)

    def _space(self, logits: Tensor) -> Tensor | None:
        """CUDA: memory for sums between blocks; None where one block computes the call alone."""
        classes = logits.shape[1]
        if classes <= _CLASSES and logits.numel() <= _ROWS * classes:
            return None
        return _empty(self.core.distill_workspace, dtype=torch.float64, device=logits.device)

    def _stack_space(self, teachers: Tensor) -> Tensor:
        """CUDA: memory for totals, and for what rows keep of each teacher."""
        core, count = self.core, teachers.shape[0]
        slots = max(core.ensemble_slots, min(teachers.numel() // (count * teachers.shape[2]), _SLOTS[_lanes(teachers)]))
        size = core.ensemble_totals + slots * core.ensemble_numbers * count
        return _empty(size, dtype=torch.float64, device=teachers.device)


def _by_class(weights: Tensor) -> bool:
    return weights.dim() > 1 and weights.shape[2] > 1


def _lanes(teachers: Tensor) -> int:
    """How many threads share a row of an ensemble."""
    classes = teachers.shape[2]
    if classes <= _FEW or (classes < _MANY and teachers.stride(2) != 1):
        return 1
    return 32 if classes < _MANY else 256


for _name, _check in (
    *[(name, "logits_fit") for name in ("kl_div", "dual_kl", "entropy")],
    *[(name, "tensors_fit") for name in ("ensemble_kl", "js_div", "consensus")],
):
    serve(
        _name,
        cpu=DistillKernels,
        cuda=DistillKernels,
        triton="_distill.triton.distill:TritonDistill",
        triton_leaves="infinite temperatures" if "kl" in _name else "",
        fits=_check,
    )
