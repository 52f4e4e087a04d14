"""kl_div against a teacher that is stored at k of C classes: ``(values, indices)``."""

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
_MOST = 0.01  # largest log-probability, rounded (csrc/include/fedkern/sparse.h)


def check_teacher(student: Tensor, teacher: object, remainder: str) -> tuple[Tensor, Tensor]:
    """Return ``values`` and ``indices`` (int64) of a stored teacher, after all checks that need no values."""
    if remainder not in RESTS:
        raise ValueError(f'rest must be "renormalise" or "spread", but is {remainder!r}')
    if not isinstance(teacher, tuple) or len(teacher) != 2:
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
    check_device(values, "values", student, "student")
    check_device(indices, "indices", student, "student")
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
    if remainder == "spread" and (highest := float(values.max())) > _MOST:
        raise ValueError(f'values must be log-probabilities with rest="spread", so at most 0, but reach {highest:g}')


def spread_rest(values: Tensor, classes: int) -> Tensor:
    """Return the logarithm of what probabilities exp(values) leave to each other class, float64 ``[B, 1, *positions]``.

    -inf if they leave nothing, which rounded ones may miss.
    """
    left = (1 - values.double().exp().sum(1, keepdim=True)).clamp_min(0)
    return (left / (classes - values.shape[1])).log()


def fill_classes(values: Tensor, indices: Tensor, classes: int, remainder: str) -> Tensor:
    """Return the teacher's logits at all classes, ``[B, C, *positions]`` in float32, or float64 for float64 values."""
    values = values.to(compute_dtype(values.dtype))
    shape = (values.shape[0], classes, *values.shape[2:])
    if remainder == "spread" and values.shape[1] < classes:
        full = spread_rest(values, classes).to(values.dtype).expand(shape)
    else:
        full = values.new_full((), -torch.inf).expand(shape)
    return full.scatter(1, indices, values)


def serve_sparse(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    temperature: float,
    reduction: int,
    remainder: str,
) -> Tensor | None:
    """Return the loss from the CPU kernel, or None where all logits must serve: in unusual calls, and on GPUs.

    ``values``, ``indices`` and ``weight`` are checked, but for the values in them.
    """
    tensors = (student, values) if weight is None else (student, values, weight)
    if not eager(*tensors, indices):
        return None
    kernel: DistillKernels | None = None
    if temperature <= FLAT and not (weight is not None and weight.requires_grad):
        kernel = select("kl_div", *tensors)
    double = result_dtype(student, None, values) is torch.float64
    if kernel is None or not kernel.sparse or double != (student.dtype is torch.float64) or class_rows(student) is None:
        if indices.is_cpu:
            check_classes(values, indices, student.shape[1], remainder)
        return None
    settings = (kernel, temperature, reduction, remainder)
    if student.requires_grad and torch.is_grad_enabled():
        return SparseFunction.call(settings, student, values, indices, weight)
    return _launch(settings, student, values, indices, weight)


class SparseFunction(EagerFunction):
    """Autograd function of the student alone, as :class:`fedkern.ops._distill.gradients.DivergenceFunction`."""

    @staticmethod
    def forward(
        ctx: Context,
        settings: tuple[DistillKernels, float, int, str],
        student: Tensor,
        values: Tensor,
        indices: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        ctx.settings = settings
        gradient = None if settings[2] == NONE else settings[0].empty_gradient(student)
        ctx.save_for_backward(student, values, indices, weight, gradient)
        return _launch(settings, student, values, indices, weight, None, gradient)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, values, indices, weight, ready = saved_tensors(ctx)
        kernel, temperature, reduction, remainder = ctx.settings
        gradient: Tensor | None
        if not is_readable(grad):
            teacher = fill_classes(values, indices, student.shape[1], remainder)
            constants = (None, teacher, weight, temperature, False, reduction)
            (gradient,) = differentiate_reference(
                lambda logits: divergence_reference(logits, *constants), (student,), (True,), grad
            )
        elif ready is not None and (scaled := kernel.scale_gradients((ready,), grad)) is not None:
            (gradient,) = handed_out(scaled, (ready,))
        else:
            gradient = kernel.empty_gradient(student)
            _launch(ctx.settings, student, values, indices, weight, grad.resolve_neg(), gradient)
        return None, gradient, None, None, None


def _launch(
    settings: tuple[DistillKernels, float, int, str],
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    grad: Tensor | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    """Return the loss, and write the student's ``gradient`` for ``grad`` (default: 1)."""
    kernel, temperature, reduction, remainder = settings
    dtype = result_dtype(student, None, values)
    result = torch.empty(row_shape(student) if reduction == NONE else (), dtype=dtype, device=student.device)
    kept = values.shape[1]
    fits = kernel.core.sparse_kl(
        class_rows(student), _flat_rows(values, kept), _flat_rows(indices, kept), remainder == "spread",
        _row_numbers(weight), _row_numbers(grad), None if gradient is None else class_rows(gradient),
        _row_numbers(result), temperature, mean_scale(student, reduction), kernel.at(student),
    )  # fmt: skip
    if not fits:
        check_classes(values, indices, student.shape[1], remainder)
    return result


def class_rows(x: Tensor) -> Tensor | None:
    """Return a view ``[rows, C]`` whose rows have no gaps, or None."""
    if x.dim() == 2:
        return x if x.stride(1) == 1 or x.shape[1] == 1 else None
    moved = x.movedim(1, -1)
    return moved.view(-1, x.shape[1]) if moved.is_contiguous() else None


def _flat_rows(x: Tensor, kept: int) -> Tensor:
    return x.contiguous() if x.dim() == 2 else x.movedim(1, -1).reshape(-1, kept)


def _row_numbers(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() == 0 else x.flatten().contiguous()
