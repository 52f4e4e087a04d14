"""kl_div against a teacher that is stored at k of C classes: ``(values, indices)``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import compute_dtype, eager, is_readable, select
from fedkern.ops._core.checks import check_device, check_floating, check_tensor
from fedkern.ops._core.library import Context, EagerFunction, differentiate_reference, handed_out, saved_tensors
from fedkern.ops._distill.checks import LOGITS
from fedkern.ops._distill.kernels import DistillKernels
from fedkern.ops._distill.reference import FLAT, divergence_reference, result_dtype
from fedkern.ops._distill.rows import NONE, mean_scale, row_shape

RESTS = ("renormalise", "spread")
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
Settings = tuple[DistillKernels, float, int, str]  # with the temperature, the reduction and the rest
Tensors = Sequence[Any]  # student, values, indices, and weight or None
_MOST = 0.01  # largest log-probability, rounded (csrc/include/fedkern/sparse.h)


def check_teacher(student: Tensor, teacher: Sequence[Tensor], remainder: str) -> tuple[Tensor, Tensor]:
    """Return ``values`` and ``indices`` (int64) of a stored teacher, after all checks that need no values."""
    if remainder not in RESTS:
        raise ValueError(f'rest must be "renormalise" or "spread", but is {remainder!r}')
    if len(teacher) != 2:
        raise TypeError("teacher must be a tensor of logits, or a tuple (values, indices)")
    values, indices = teacher
    check_floating(values, "values", LOGITS)
    check_tensor(indices, "indices")
    if indices.dtype not in _INTEGERS:
        raise TypeError(f"indices must have a whole-number dtype such as int64, but has {indices.dtype}")
    batch, classes, *positions = student.shape
    kept = values.shape[1] if values.dim() > 1 else 0
    if values.shape != (batch, kept, *positions) or not 1 <= kept <= classes:
        raise ValueError(
            f"values must have the student's shape {list(student.shape)} with 1 to {classes} classes on the class "
            f"axis, but has {list(values.shape)}"
        )
    if indices.shape != values.shape:
        raise ValueError(f"indices must have the shape {list(values.shape)} of values, but has {list(indices.shape)}")
    for name, x in (("values", values), ("indices", indices)):
        check_device(x, name, student, "student")
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError("a teacher (values, indices) gets no gradient: detach its values, or give all its logits")
    return values, indices.long()


def check_classes(values: Tensor, indices: Tensor, classes: int, remainder: str) -> None:
    """Raise ValueError for indices that are no different classes of a row, or values that are no log-probabilities."""
    if not indices.numel():
        return
    low, high = (int(x) for x in indices.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"indices must be classes from 0 to {classes - 1}, but hold {low if low < 0 else high}")
    ordered = indices.sort(1).values
    twice = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
    if twice.numel():
        raise ValueError(f"indices must be different classes in every row, but hold class {int(twice[0])} twice in one")
    if remainder == "spread" and (highest := float(values.masked_fill(values.isnan(), -torch.inf).max())) > _MOST:
        raise ValueError(f'values must be log-probabilities with rest="spread", so at most 0, but reach {highest:g}')


def fill_classes(values: Tensor, indices: Tensor, classes: int, remainder: str) -> Tensor:
    """Return the teacher's logits at all classes, ``[B, C, *positions]`` in float32, or float64 for float64 values.

    What rounded log-probabilities leave may be nothing, and then is -inf.
    """
    values = values.to(compute_dtype(values.dtype))
    floor = values.new_full((), -torch.inf)
    if remainder == "spread" and values.shape[1] < classes:
        left = (1 - values.double().exp().sum(1, keepdim=True)).clamp_min(0)
        floor = (left / (classes - values.shape[1])).log().to(values.dtype)
    return floor.expand(values.shape[0], classes, *values.shape[2:]).scatter(1, indices, values)


def serve_sparse(tensors: Tensors, temperature: float, reduction: int, remainder: str) -> Tensor | None:
    """Return the loss from the CPU kernel, or None where all logits must serve: in unusual calls, and on GPUs.

    ``tensors`` are checked, but for the values in them.
    """
    student, values, indices, weight = tensors
    floating = (student, values) if weight is None else (student, values, weight)
    if not eager(*floating, indices):
        return None
    kernel: DistillKernels | None = None
    # Computed in the student's type, which values in float64 are not.
    fits = class_rows(student) is not None and (student.dtype is torch.float64 or values.dtype is not torch.float64)
    if temperature <= FLAT and fits and not (weight is not None and weight.requires_grad):
        kernel = select("kl_div", *floating)
    if kernel is None or not kernel.sparse:
        if indices.is_cpu:
            check_classes(values, indices, student.shape[1], remainder)
        return None
    settings = (kernel, temperature, reduction, remainder)
    if student.requires_grad and torch.is_grad_enabled():
        return SparseFunction.call(settings, *tensors)
    return _launch(settings, tensors)


class SparseFunction(EagerFunction):
    """Autograd function of the student alone, as :class:`fedkern.ops._distill.gradients.DivergenceFunction`."""

    @staticmethod
    def forward(ctx: Context, settings: Settings, *tensors: Tensor) -> Tensor:
        ctx.settings = settings
        gradient = None if settings[2] == NONE else settings[0].empty_gradient(tensors[0])
        ctx.save_for_backward(*tensors, gradient)
        return _launch(settings, tensors, None, gradient)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, ready = saved_tensors(ctx)
        student, values, indices, weight = tensors
        kernel, temperature, reduction, remainder = ctx.settings
        gradient: Tensor | None
        if not is_readable(grad):
            full = fill_classes(values, indices, student.shape[1], remainder)
            constants = (None, full, weight, temperature, False, reduction)
            (gradient,) = differentiate_reference(
                lambda logits: divergence_reference(logits, *constants), (student,), (True,), grad
            )
        elif ready is not None and (scaled := kernel.scale_gradients((ready,), grad)) is not None:
            (gradient,) = handed_out(scaled, (ready,))
        else:
            gradient = kernel.empty_gradient(student)
            _launch(ctx.settings, tensors, grad.resolve_neg(), gradient)
        return None, gradient, None, None, None


def _launch(settings: Settings, tensors: Tensors, grad: Tensor | None = None, gradient: Tensor | None = None) -> Tensor:
    """Return the loss, and write the student's ``gradient`` for ``grad`` (default: 1)."""
    kernel, temperature, reduction, remainder = settings
    student, values, indices, weight = tensors
    dtype = result_dtype(student, None, values)
    result = torch.empty(row_shape(student) if reduction == NONE else (), dtype=dtype, device=student.device)
    stored = [values, indices] if values.dim() == 2 else [x.movedim(1, -1).flatten(0, -2) for x in (values, indices)]
    numbers = [x if x is None or not x.dim() else x.flatten().contiguous() for x in (weight, grad, result)]
    fits = kernel.core.sparse_kl(
        class_rows(student), *[x.contiguous() for x in stored], remainder == "spread", *numbers[:2],
        class_rows(gradient), numbers[2], temperature, mean_scale(student, reduction), kernel.at(student),
    )  # fmt: skip
    if not fits:
        check_classes(values, indices, student.shape[1], remainder)
    return result


def class_rows(x: Tensor | None) -> Tensor | None:
    """Return a view ``[rows, C]`` whose rows have no gaps, or None."""
    if x is None or x.dim() == 2:
        return x if x is None or x.stride(1) == 1 or x.shape[1] == 1 else None
    moved = x.movedim(1, -1)
    return moved.view(-1, x.shape[1]) if moved.is_contiguous() else None
