"""The distill family in ``torch.library``: a table for every loss (library.py makes two operators of each)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import select
from fedkern.ops._distill.checks import check_values
from fedkern.ops._distill.ensemble_reference import consensus_reference, ensemble_reference, js_reference
from fedkern.ops._distill.kernels import DistillKernels, divergence_settings, ensemble_settings
from fedkern.ops._distill.library import (
    Loss,
    Optionals,
    define,
    fold_rows,
    fold_stack,
    reference_gradients,
    unfold_rows,
    unfold_stack,
)
from fedkern.ops._distill.reference import divergence_reference, entropy_rows_reference, is_flat, result_dtype


def _given(*tensors: Any) -> list[Tensor]:
    return [t for t in tensors if t is not None]


# --- kl_div, dual_kl: divergence(student, other, teacher, weight, temperature, reverse, reduction)


def _kernel_of_divergence(tensors: Optionals, temperature: float) -> DistillKernels | None:
    if is_flat(temperature):
        return None
    return select("kl_div" if tensors[1] is None else "dual_kl", *_given(*tensors))


def _run_divergence(tensors: Optionals, settings: Sequence[Any]) -> Any:
    student, other, teacher, weight = tensors
    kernel = _kernel_of_divergence(tensors, settings[0])
    if kernel is None:
        return divergence_reference(*tensors, *settings)
    return kernel.divergence_forward(student, other, teacher, weight, divergence_settings(*settings))


def _run_divergence_backward(
    grads: Sequence[Tensor], tensors: Optionals, settings: Sequence[Any], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    kernel = _kernel_of_divergence(tensors, settings[0])
    if kernel is None:
        return reference_gradients(divergence_reference, grads, tensors, settings, needs)
    student, other, teacher, weight = tensors
    return kernel.divergence_backward(grads[0], student, other, teacher, weight, divergence_settings(*settings), needs)


def _divergence_dtype(tensors: Optionals) -> torch.dtype:
    return result_dtype(*tensors[:3])


def _fold_each(tensors: Optionals, axes: Sequence[int | None], count: int) -> Optionals:
    return tuple(fold_rows(x, axis, count) for x, axis in zip(tensors, axes, strict=True))


def _unfold_each(which: int, gradient: Tensor, count: int) -> Tensor:
    return unfold_rows(gradient, count)


DIVERGENCE = define(
    Loss(
        name="divergence",
        tensors=("student", "other?", "teacher", "weight?"),
        differentiable=4,
        settings=("float temperature", "bool reverse", "int reduction"),
        results=1,
        stacked=False,
        run=_run_divergence,
        run_backward=_run_divergence_backward,
        reference=divergence_reference,
        dtype=_divergence_dtype,
        fold=_fold_each,
        unfold=_unfold_each,
    )
)


# --- entropy(logits, reduction)


def _run_entropy(tensors: Optionals, settings: Sequence[Any]) -> Any:
    kernel = select("entropy", *tensors)
    return (entropy_rows_reference if kernel is None else kernel.entropy_forward)(*tensors, *settings)


def _run_entropy_backward(
    grads: Sequence[Tensor], tensors: Optionals, settings: Sequence[Any], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    kernel = select("entropy", *tensors)
    if kernel is None:
        return reference_gradients(entropy_rows_reference, grads, tensors, settings, needs)
    return (kernel.entropy_backward(grads[0], *tensors, *settings),)


def _logits_dtype(tensors: Optionals) -> torch.dtype:
    return tensors[0].dtype


ENTROPY = define(
    Loss(
        name="entropy",
        tensors=("logits",),
        differentiable=1,
        settings=("int reduction",),
        results=1,
        stacked=False,
        run=_run_entropy,
        run_backward=_run_entropy_backward,
        reference=entropy_rows_reference,
        dtype=_logits_dtype,
        fold=_fold_each,
        unfold=_unfold_each,
    )
)


# --- ensemble_kl(student, teachers, weights, class_mask, temperature, mix, log_probs, reduction)


def _kernel_of_ensemble(tensors: Optionals, temperature: float) -> Any:
    _check_weights(tensors[2], tensors[1].dim())
    return None if is_flat(temperature) else select("ensemble_kl", *_given(*tensors[:3]))


def _check_weights(weights: Tensor | None, dims: int) -> None:
    """The public functions spread weights; short ones would mean something else to the reference."""
    if weights is not None and weights.dim() != dims:
        raise ValueError(f"weights must have {dims} axes, but have shape {list(weights.shape)}")
    check_values(weights)


def _run_ensemble(tensors: Optionals, settings: Sequence[Any]) -> Any:
    kernel = _kernel_of_ensemble(tensors, settings[0])
    if kernel is None:
        return ensemble_reference(*tensors, *settings)
    return kernel.ensemble_forward(*tensors, ensemble_settings(*settings))


def _run_ensemble_backward(
    grads: Sequence[Tensor], tensors: Optionals, settings: Sequence[Any], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    kernel = _kernel_of_ensemble(tensors, settings[0])
    if kernel is None:
        return reference_gradients(ensemble_reference, grads, tensors, settings, needs)
    return kernel.ensemble_backward(grads[0], *tensors, ensemble_settings(*settings), needs)


def _ensemble_dtype(tensors: Optionals) -> torch.dtype:
    return result_dtype(tensors[0], None, tensors[1])


def _fold_ensemble(tensors: Optionals, axes: Sequence[int | None], count: int) -> Optionals:
    student, teachers, weights, mask = tensors
    if mask is not None and axes[3] is not None:
        # Masks of several mapped calls do not fold into one [K, C]. So they set weights to 0, which is all a mask does.
        each = mask.movedim(axes[3], 0).transpose(0, 1)  # [K, V, C]
        rows: Any = fold_rows(student, axes[0], count)
        stack = (teachers.shape[0 if axes[1] is None or axes[1] > 0 else 1], count, rows.shape[0] // count)
        shape = (*stack, *student.shape[1 if axes[0] is None else 2 :])
        each = each.reshape(each.shape[0], count, 1, each.shape[2], *[1] * (len(shape) - 4)).expand(shape)
        folded = fold_stack(weights, axes[2], count)
        base = torch.ones((), dtype=torch.float32, device=mask.device) if folded is None else folded
        weights, mask = torch.where(each.flatten(1, 2), base, 0), None
    else:
        weights = fold_stack(weights, axes[2], count)
    return fold_rows(student, axes[0], count), fold_stack(teachers, axes[1], count), weights, mask


def _unfold_ensemble(which: int, gradient: Tensor, count: int) -> Tensor:
    return unfold_rows(gradient, count) if which == 0 else unfold_stack(gradient, count)


ENSEMBLE = define(
    Loss(
        name="ensemble",
        tensors=("student", "teachers", "weights?", "class_mask?"),
        differentiable=3,
        settings=("float temperature", "int mix", "bool log_probs", "int reduction"),
        results=1,
        stacked=False,
        run=_run_ensemble,
        run_backward=_run_ensemble_backward,
        reference=ensemble_reference,
        dtype=_ensemble_dtype,
        fold=_fold_ensemble,
        unfold=_unfold_ensemble,
    )
)


# --- js_div(logits, weights, reduction), consensus(logits, weights, reduction)


def _fold_both(tensors: Optionals, axes: Sequence[int | None], count: int) -> Optionals:
    return tuple(fold_stack(x, axis, count) for x, axis in zip(tensors, axes, strict=True))


def _unfold_both(which: int, gradient: Tensor, count: int) -> Tensor:
    return unfold_stack(gradient, count)


def _over_logits(name: str, operator: str, method: str, results: int, reference: Callable[..., Any]) -> Loss:
    """The table of ``operator``, whose kernels are ``<method>_forward`` and ``<method>_backward``."""

    def run(tensors: Optionals, settings: Sequence[Any]) -> Any:
        _check_weights(tensors[1], tensors[0].dim() - 1)
        kernel = select(operator, *_given(*tensors))
        return (reference if kernel is None else getattr(kernel, f"{method}_forward"))(*tensors, *settings)

    def run_backward(
        grads: Sequence[Tensor], tensors: Optionals, settings: Sequence[Any], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        _check_weights(tensors[1], tensors[0].dim() - 1)
        kernel = select(operator, *_given(*tensors))
        if kernel is None:
            return reference_gradients(reference, grads, tensors, settings, needs)
        gradients: Sequence[Tensor | None] = getattr(kernel, f"{method}_backward")(*grads, *tensors, *settings, needs)
        return gradients

    return Loss(
        name=name,
        tensors=("logits", "weights?"),
        differentiable=2,
        settings=("int reduction",),
        results=results,
        stacked=True,
        run=run,
        run_backward=run_backward,
        reference=reference,
        dtype=_logits_dtype,
        fold=_fold_both,
        unfold=_unfold_both,
    )


JS = define(_over_logits("jensen_shannon", "js_div", "js", 1, js_reference))
CONSENSUS = define(_over_logits("consensus", "consensus", "consensus", 2, consensus_reference))
