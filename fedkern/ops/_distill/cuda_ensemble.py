"""ensemble_kl, js_div and consensus on CUDA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import DTYPES, address
from fedkern.ops._core.cuda import queue
from fedkern.ops._distill.arguments import CONSENSUS, JS, STACK, argument
from fedkern.ops._distill.common import BATCHMEAN, NONE, row_shape
from fedkern.ops._distill.kernels import Ensemble
from fedkern.ops._distill.reference import compute_dtype, result_dtype

# Most rows computed at a time, by threads per row (csrc/cuda/distill_ensemble.cu): about as many as the largest GPUs
# have room for. The numbers that a row keeps for each teacher are in the call's workspace.
_SLOTS = {1: 1 << 16, 32: 1 << 14, 256: 1 << 11}
# Classes up to which one thread takes a row, and from which a block does.
_FEW, _MANY = 4, 1024


class CudaEnsembles:
    """The methods of :class:`fedkern.ops._distill.kernels.DistillKernel` that take K teachers."""

    def __init__(self, core: Any) -> None:
        self._core = core

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
        dtype = result_dtype(student, None, teachers)
        result = _result(student, dtype, settings.reduction)
        gradients = (argument(to_student), argument(to_teachers), None)
        self._run(settings.mix, student, teachers, weights, class_mask, settings, dtype, gradients, results=(result,))
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
        tensors = (student, teachers, weights, class_mask)
        dtype = result_dtype(student, None, teachers)
        to_student = torch.empty_like(student) if needs[0] else None
        to_teachers = torch.empty_like(teachers) if needs[1] else None
        to_weights = None
        if needs[2] and weights is not None:
            # Per class also if the weights differ between classes only by the mask: the kernel then reads every class.
            by_class = class_mask is not None or weights.shape[2] > 1
            shape = (*weights.shape[:2], teachers.shape[2], *weights.shape[3:]) if by_class else weights.shape
            to_weights = torch.empty(shape, dtype=compute_dtype(dtype), device=weights.device)
        gradients = (argument(to_student), argument(to_teachers), argument(to_weights))
        self._run(settings.mix, *tensors, settings, dtype, gradients, grads=(grad.resolve_neg(),))
        if to_weights is not None and weights is not None:
            if to_weights.shape != weights.shape:
                to_weights = to_weights.sum(2, keepdim=True)
            to_weights = to_weights.to(weights.dtype)
        return to_student, to_teachers, to_weights

    def js_forward(
        self, logits: Tensor, weights: Tensor | None, reduction: int, to_logits: Tensor | None = None
    ) -> Tensor:
        result = _result(logits[0], logits.dtype, reduction)
        self._stack(JS, logits, weights, reduction, (None, argument(to_logits), None), results=(result,))
        return result

    def js_backward(
        self, grad: Tensor, logits: Tensor, weights: Tensor | None, reduction: int, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        return self._stack_backward(JS, (grad,), logits, weights, reduction, needs)

    def consensus_forward(
        self, logits: Tensor, weights: Tensor | None, reduction: int, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        first, second = (_result(logits[0], logits.dtype, reduction) for _ in range(2))
        self._stack(CONSENSUS, logits, weights, reduction, (None, None, None), results=(first, second))
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
        return self._stack_backward(CONSENSUS, (grad_mixture, grad_mean), logits, weights, reduction, needs)

    def _stack_backward(
        self,
        kind: int,
        grads: tuple[Tensor, ...],
        logits: Tensor,
        weights: Tensor | None,
        reduction: int,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        to_logits = torch.empty_like(logits) if needs[0] else None
        to_weights = None
        if needs[1] and weights is not None:
            to_weights = torch.empty(weights.shape, dtype=compute_dtype(logits.dtype), device=logits.device)
        # unsqueeze(2): the class axis, which weights per row lack.
        gradients = (None, argument(to_logits), None if to_weights is None else argument(to_weights.unsqueeze(2)))
        self._stack(kind, logits, weights, reduction, gradients, grads=tuple([grad.resolve_neg() for grad in grads]))
        return to_logits, to_weights if weights is None or to_weights is None else to_weights.to(weights.dtype)

    def _stack(
        self, kind: int, logits: Tensor, weights: Tensor | None, reduction: int, gradients: Any, **more: Any
    ) -> None:
        weights = None if weights is None else weights.unsqueeze(2)
        self._run(kind, None, logits, weights, None, STACK[reduction], logits.dtype, gradients, **more)

    def _run(
        self,
        kind: int,
        student: Tensor | None,
        teachers: Tensor,
        weights: Tensor | None,
        class_mask: Tensor | None,
        settings: Ensemble,
        dtype: torch.dtype,
        gradients: tuple[Any, Any, Any],
        *,
        grads: tuple[Tensor, ...] = (),
        results: tuple[Tensor, ...] = (),
    ) -> None:
        core, count = self._core, teachers.shape[0]
        rows = teachers.numel() // (count * teachers.shape[2])
        slots = max(core.ensemble_slots, min(rows, _SLOTS[_lanes(teachers)]))
        size = core.ensemble_totals + slots * core.ensemble_numbers * count
        workspace = torch.empty(size, dtype=torch.float64, device=teachers.device)
        core.distill_ensemble(
            kind,
            settings.temperature == math.inf,
            settings.log_probs and settings.temperature == 1.0,
            class_mask is not None or (weights is not None and weights.shape[2] > 1),
            1 if dtype is torch.float64 else 0,
            teachers.shape,
            settings.temperature,
            None if settings.reduction == BATCHMEAN else 1.0,
            1,
            argument(student),
            argument(teachers),
            _weights_argument(weights),
            None if class_mask is None else (address(class_mask, "class_mask"), class_mask.stride()),
            *gradients,
            argument(grads[0]) if grads else None,
            argument(grads[1]) if len(grads) > 1 else None,
            (
                settings.reduction == NONE,
                argument(results[0]) if results else None,
                argument(results[1]) if len(results) > 1 else None,
            ),
            workspace.data_ptr(),
            slots,
            *queue(teachers),
        )


def _lanes(teachers: Tensor) -> int:
    """How many threads share a row."""
    classes = teachers.shape[2]
    if classes <= _FEW or (classes < _MANY and teachers.stride(2) != 1):
        return 1
    return 32 if classes < _MANY else 256


def _result(rows_of: Tensor, dtype: torch.dtype, reduction: int) -> Tensor:
    return torch.empty(row_shape(rows_of) if reduction == NONE else (), dtype=dtype, device=rows_of.device)


def _weights_argument(weights: Tensor | None) -> tuple[int | None, int, tuple[int, ...]] | None:
    """Weights as the core takes them; the class stride is 0 if all classes share a weight, whatever the tensor's is."""
    if weights is None:
        return None
    strides = weights.stride()
    if weights.shape[2] == 1:
        strides = (*strides[:2], 0, *strides[3:])
    return address(weights, "weights"), DTYPES[weights.dtype], strides
