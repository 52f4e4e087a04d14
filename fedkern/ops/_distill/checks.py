"""Checks of the distill family's arguments."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedkern.ops._core.backend import DTYPES, eager
from fedkern.ops._core.checks import check_count, check_device, check_floating, check_tensor, show_value, to_float
from fedkern.ops._distill.rows import MAX_DIMS, REDUCTIONS, row_shape

LOGITS = "a tensor of logits"

# Checks in detail. The public functions first test all in one fast step, and need most of these only where it fails.


def check_logits(names: tuple[str, ...], tensors: Sequence[Tensor]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        check_floating(tensor, name, LOGITS)
        if not 2 <= tensor.dim() <= MAX_DIMS or tensor.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape [B, C] or [B, C, *positions] with at least one class, but has "
                f"{list(tensor.shape)}"
            )
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"{name} must have the shape {list(tensors[0].shape)} of {names[0]}, but has {list(tensor.shape)}"
            )
        check_device(tensor, name, tensors[0], names[0])


def move_classes(
    names: Sequence[str], tensors: tuple[Tensor, ...], dim: int, stacks: Sequence[int]
) -> tuple[Tensor, ...]:
    """Return views of ``tensors`` whose class axis ``dim`` is moved to 1.

    ``stacks`` are the leading axes of each tensor that ``dim`` does not count, 1 for a stack of teachers.
    """
    views = []
    for name, tensor, stack in zip(names, tensors, stacks, strict=True):
        check_floating(tensor, name, LOGITS)
        dims = max(tensor.dim() - stack, 1)
        axis = check_count(dim, "dim", -dims, dims - 1) % dims
        if dims < 2 or tensor.shape[stack:] != tensors[0].shape[stacks[0] :]:
            return tensors  # whose shapes the caller refuses, as they are
        views.append(tensor if axis == 1 else tensor.movedim(axis + stack, 1 + stack))
    return tuple(views)


def check_weight(weight: Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    check_tensor(weight, "weight")
    if weight.dtype is torch.bool:
        weight = weight.to(dtype)
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must have dtype bool, float32, float64, bfloat16 or float16, but has {weight.dtype}")
    check_device(weight, "weight", logits, "the logits")
    rows = row_shape(logits)
    if weight.shape == rows:
        return weight
    if weight.shape == rows[:1]:
        if weight.requires_grad and weight.dtype.itemsize == 2:
            weight = weight.float()  # its gradient is a sum over positions, rounded once
        return weight.reshape(-1, *[1] * (len(rows) - 1)).expand(rows)
    expected = f"{list(rows[:1])} or {list(rows)}" if len(rows) > 1 else f"{list(rows)}"
    raise ValueError(f"weight must have shape {expected}, one value per row, but has {list(weight.shape)}")


def check_temperature(temperature: float) -> float:
    if isinstance(temperature, (Tensor, bool)):
        raise TypeError(f"temperature must be a number, not {type(temperature).__name__}")
    value = to_float(temperature, "temperature")
    if not value > 0:
        raise ValueError(f"temperature must be above 0 (math.inf for the limit), but is {show_value(temperature)}")
    return value


def check_reduction(reduction: str) -> int:
    code = REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if code is None:
        raise ValueError(f'reduction must be "none", "sum" or "batchmean", but is {reduction!r}')
    return code


def check_stack(name: str, stack: Tensor) -> None:
    check_floating(stack, name, LOGITS)
    if not 3 <= stack.dim() <= MAX_DIMS + 1 or stack.shape[0] == 0 or stack.shape[2] == 0:
        raise ValueError(
            f"{name} must have shape [K, B, C] or [K, B, C, *positions] with at least one teacher and class, but has "
            f"{list(stack.shape)}"
        )


def check_student(student: Tensor, teachers: Tensor) -> None:
    check_floating(student, "student", LOGITS)
    if student.shape != teachers.shape[1:]:
        raise ValueError(
            f"student must have the shape {list(teachers.shape[1:])} of one of the teachers, but has "
            f"{list(student.shape)}"
        )
    check_device(student, "student", teachers, "teachers")


def check_values(weights: object, ordinary: bool = False) -> None:
    """Raise ValueError for negative or non-finite weights, unless on a GPU or not known yet.

    ``ordinary``: select_ordinary has accepted the weights.
    """
    if not (isinstance(weights, Tensor) and weights.is_cpu and (ordinary or eager(weights))):
        return
    if ordinary and weights.dim() == 1 and weights.shape[0] <= 64:  # faster than three tensor operations
        numbers = weights.tolist()
        if min(numbers, default=0) >= 0 and sum(numbers) < math.inf:  # with a NaN the sum is one
            return
    if weights.layout is not torch.strided or weights.is_nested or weights.dtype not in DTYPES:
        return  # _check_kind refuses it, or takes booleans
    if not weights.detach().clamp(0, torch.finfo(weights.dtype).max).equal(weights):  # neither is a NaN
        raise ValueError("weights must be at least 0 and finite")


def _check_kind(weights: Tensor, stack: Tensor) -> Tensor:
    check_tensor(weights, "weights")
    if weights.dtype is torch.bool or (
        weights.dtype in (torch.bfloat16, torch.float16) and (weights.dim() < stack.dim() or 1 in weights.shape)
    ):
        # A weight shared by several rows gets the sum of their gradients: the summands must not be rounded to 16 bits.
        weights = weights.to(torch.float32)
    if weights.dtype not in DTYPES:
        raise TypeError(f"weights must have dtype bool, float32, float64, bfloat16 or float16, but has {weights.dtype}")
    check_device(weights, "weights", stack, "the teachers")
    return weights


def _near_one(weights: Tensor) -> Tensor:
    """Divide fp64 ``weights [K, ...]`` by the largest of the K: beside fp32 logits they are cast to fp32."""
    if weights.dtype is not torch.float64:
        return weights
    largest = weights.detach().amax(0)
    return weights / torch.where((largest > 0) & (largest < math.inf), largest, 1)


def spread_weights(weights: Tensor, teachers: Tensor) -> Tensor:
    """Return ``weights`` as ``[K, B, 1, *positions]``, or ``[K, B, C, *positions]`` where they differ by class."""
    weights = _check_kind(weights, teachers)
    count, batch, classes, *positions = teachers.shape
    shape, dims = weights.shape, weights.dim()
    full: tuple[int, ...] | None = None
    if dims == 1 and shape[0] == count:
        full = (count, 1, 1)
    elif dims == 2 and shape[0] == count and shape[1] in (batch, classes):
        if batch == classes:
            raise ValueError(
                f"weights of shape {list(shape)} could be [K, B] or [K, C], which are the same here: give [K, B, 1] or "
                "[K, 1, C]"
            )
        full = (count, batch, 1) if shape[1] == batch else (count, 1, classes)
    elif (
        dims in (3, teachers.dim())
        and shape[0] == count
        and all(size in (1, full_size) for size, full_size in zip(shape[1:], teachers.shape[1:], strict=False))
    ):
        full = tuple(shape)
    if full is None:
        raise ValueError(
            "weights must have shape [K], [K, B], [K, C], [K, B, C], [K, B, 1], [K, 1, C] or one that broadcasts to "
            f"the teachers' {list(teachers.shape)}, but has {list(shape)}"
        )
    full = (*full, *[1] * (teachers.dim() - len(full)))
    return _near_one(weights).reshape(full).expand(count, batch, full[2], *positions)


def spread_row_weights(weights: Tensor, logits: Tensor, ordinary: bool = False) -> Tensor:
    """Return ``weights`` ``[K]``, ``[K, B]`` or ``[K, B, *positions]`` expanded to ``[K, B, *positions]``."""
    weights = _check_kind(weights, logits)
    rows = logits.shape[:2] + logits.shape[3:]
    dims = weights.dim()
    if dims not in (1, 2, len(rows)) or weights.shape != rows[:dims]:
        alternative = f" or {list(rows)}" if len(rows) > 2 else ""
        raise ValueError(
            f"weights must have shape {list(rows[:1])}, {list(rows[:2])}{alternative}, but has {list(weights.shape)}"
        )
    weights = _near_one(weights)
    if dims == 1 and ordinary and not weights.requires_grad:  # in one step: at 64 rows the time of two shows
        return weights.as_strided(rows, (weights.stride(0), *[0] * (len(rows) - 1)))
    return weights.reshape(*weights.shape, *[1] * (len(rows) - dims)).expand(rows)


def check_mask(mask: Tensor, teachers: Tensor) -> None:
    check_tensor(mask, "class_mask", "a bool tensor")
    if mask.dtype is not torch.bool:
        raise TypeError(f"class_mask must have dtype bool, but has {mask.dtype}")
    expected = [teachers.shape[0], teachers.shape[2]]
    if list(mask.shape) != expected:
        raise ValueError(f"class_mask must have shape [K, C], here {expected}, but has {list(mask.shape)}")
    check_device(mask, "class_mask", teachers, "the teachers")


def mask_weights(weights: Tensor | None, mask: Tensor, teachers: Tensor) -> Tensor:
    """Return weights that are 0 for masked classes: masks are not mapped."""
    shares = torch.ones((), device=mask.device) if weights is None else weights
    return torch.where(mask.reshape(len(mask), 1, -1, *[1] * (teachers.dim() - 3)), shares, 0).expand(teachers.shape)


def without_unknown(teachers: Tensor, weights: Tensor | None, mask: Tensor | None) -> Tensor:
    """Set NaN and a dtype's largest numbers to -inf in classes of weight 0.

    A teacher's values there must not reach its softmax over known classes.
    """
    by_class = weights is not None and weights.dim() > 2 and weights.shape[2] > 1
    if not (by_class or mask is not None) or not teachers.numel():
        return teachers
    largest, ordinary = torch.finfo(teachers.dtype).max, teachers.is_cpu and eager(teachers)
    if ordinary:  # one look is less than a copy; on a GPU it would wait for the device
        low, high = teachers.detach().aminmax()
        if -largest < low and high < largest:
            return teachers
    unknown = [] if mask is None else [~mask.reshape(len(mask), 1, -1, *[1] * (teachers.dim() - 3))]
    unknown += [weights == 0] if weights is not None and by_class else []
    return torch.where((unknown[0] | unknown[-1]) & ~(teachers.abs() < largest), -math.inf, teachers)
