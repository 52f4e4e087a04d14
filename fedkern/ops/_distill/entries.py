"""The distill family in ``torch.library``: a table for every loss (library.py makes two operators of each)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fedkern.ops._core.backend import select
from fedkern.ops._distill.checks import check_values
from fedkern.ops._distill.ensemble_reference import consensus_reference, ensemble_reference, js_reference
from fedkern.ops._distill.kernels import DistillKernels, Divergence, Ensemble, consensus_call, entropy_call, js_call
from fedkern.ops._distill.library import Loss, Reference, define_loss
from fedkern.ops._distill.reference import divergence_reference, entropy_rows_reference, is_flat, result_dtype


def _select(operator: str, *tensors: Tensor | None) -> DistillKernels | None:
    return select(operator, *[x for x in tensors if x is not None])


def select_at(temperature: float, operator: str, *tensors: Tensor | None) -> DistillKernels | None:
    """Return the kernels for this temperature, or None for the reference."""
    kernel = None if is_flat(temperature) else _select(operator, *tensors)
    return None if kernel is not None and temperature == math.inf and not kernel.limits else kernel


DIVERGENCE: Callable[..., Tensor] = define_loss(
    Loss(
        name="divergence",
        tensors=("student", "other?", "teacher", "weight?"),
        differentiable=4,
        settings=("float temperature", "bool reverse", "int reduction"),
        results=1,
        axes=(0, 0, 0, 0),
        call=Divergence,
        kernel=lambda call: select_at(call.temperature, "kl_div" if call.peer is None else "dual_kl", *call[:4]),
        method="divergence",
        reference=divergence_reference,
        dtype=lambda tensors: result_dtype(*tensors[:3]),
    )
)
ENTROPY: Callable[..., Tensor] = define_loss(
    Loss(
        name="entropy",
        tensors=("logits",),
        differentiable=1,
        settings=("int reduction",),
        results=1,
        axes=(0,),
        call=entropy_call,
        kernel=lambda call: _select("entropy", call.teacher),
        method="divergence",
        skips=2,
        reference=entropy_rows_reference,
        dtype=lambda tensors: tensors[0].dtype,
    )
)


def _check_weights(weights: Tensor | None, dims: int) -> None:
    """Refuse short weights, which the public functions spread: the reference would misread them."""
    if weights is not None and weights.dim() != dims:
        raise ValueError(f"weights must have {dims} axes, but have shape {list(weights.shape)}")
    check_values(weights)


def _kernel_of_ensemble(call: Ensemble) -> DistillKernels | None:
    _check_weights(call.weights, call.teachers.dim())
    return select_at(call.temperature, "ensemble_kl", *call[:3])


ENSEMBLE: Callable[..., Tensor] = define_loss(
    Loss(
        name="ensemble",
        tensors=("student", "teachers", "weights?", "class_mask?"),
        differentiable=3,
        settings=("float temperature", "int mix", "bool log_probs", "int reduction"),
        results=1,
        axes=(0, 1, 1, None),
        call=Ensemble,
        kernel=_kernel_of_ensemble,
        method="ensemble",
        reference=ensemble_reference,
        dtype=lambda tensors: result_dtype(tensors[0], None, tensors[1]),
    )
)


def _over_logits(name: str, operator: str, call: Callable[..., Ensemble], results: int, reference: Reference) -> Loss:
    def kernel(call: Ensemble) -> DistillKernels | None:
        _check_weights(call.weights, call.teachers.dim() - 1)
        return _select(operator, call.teachers, call.weights)

    return Loss(
        name=name, tensors=("logits", "weights?"), differentiable=2, settings=("int reduction",), results=results,
        axes=(1, 1), call=call, kernel=kernel, method="ensemble", skips=1, reference=reference,
        dtype=lambda tensors: tensors[0].dtype,
    )  # fmt: skip


JS: Callable[..., Tensor] = define_loss(_over_logits("jensen_shannon", "js_div", js_call, 1, js_reference))
CONSENSUS: Callable[..., tuple[Tensor, Tensor]] = define_loss(
    _over_logits("consensus", "consensus", consensus_call, 2, consensus_reference)
)
