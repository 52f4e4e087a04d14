"""aggregate: shared checks of vectors, weights and outputs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import overload

import numpy as np
import torch
from torch import Tensor

from fedkern.ops._core import backend
from fedkern.ops._core.checks import check_dense, check_device, check_floating, mark_written, refuse_gradient, to_float
from fedkern.ops._core.library import numbers_tensor
from fedkern.ops._core.memory import place_values

Vectors = Tensor | Sequence[Tensor]
#: Checked numbers: finite, not negative, of positive sum. For vectors on a GPU also a tensor ``[M]`` there, unchecked.
Weights = Sequence[float] | Tensor


def check_vectors(vectors: Vectors) -> tuple[Tensor, int]:
    """Return a tensor with the vectors' dtype, device and last dimension, and the count M."""
    if isinstance(vectors, Tensor):
        check_floating(vectors, "vectors")
        if vectors.dim() != 2 or not vectors.shape[0]:
            raise ValueError(f"vectors must have shape [M, P] with M > 0, but has {list(vectors.shape)}")
        return vectors, vectors.shape[0]
    if not isinstance(vectors, Sequence):
        raise TypeError(f"vectors must be a list of tensors [P] or one tensor [M, P], not {type(vectors).__name__}")
    if not len(vectors):
        raise ValueError("vectors must hold at least one tensor [P]: a list of them, or one [M, P]")
    template = vectors[0]
    if isinstance(template, (Mapping, list, tuple, np.ndarray)):
        raise TypeError(
            f"vectors[0] must be a tensor [P], not {type(template).__name__}: average whole models entry by entry, or "
            "as the vectors of FlatParameters"
        )
    check_vector(template, "vectors[0]")
    dtype, shape, device = template.dtype, template.shape, template.device
    for position, vector in enumerate(vectors):
        if (
            isinstance(vector, Tensor)
            and vector.layout is template.layout
            and not vector.is_nested
            and vector.dtype is dtype
            and vector.shape == shape
            and vector.device == device
        ):
            continue
        name = f"vectors[{position}]"
        check_vector(vector, name)
        if vector.dtype != template.dtype:
            raise TypeError(f"{name} must have the dtype {template.dtype} of vectors[0], but has {vector.dtype}")
        if vector.shape != template.shape:
            raise ValueError(
                f"{name} must have the shape {list(template.shape)} of vectors[0], but has {list(vector.shape)}"
            )
        check_device(vector, name, template, "vectors[0]")
    return template, len(vectors)


def check_vector(vector: Tensor, name: str, size: int | None = None) -> None:
    check_floating(vector, name)
    if vector.dim() != 1 or (size is not None and vector.shape[0] != size):
        raise ValueError(f"{name} must have shape [{'P' if size is None else size}], but has {list(vector.shape)}")


def check_out(out: Tensor, size: int, device: torch.device, name: str = "out") -> None:
    check_vector(out, name, size)
    if out.device != device:
        raise ValueError(f"{name} must be on {device} like the vectors, but is on {out.device}")
    if size > 1 and not out.stride(0):
        raise ValueError(f"{name} must not be expanded: several of its elements share one place in memory")


def check_weights_tensor(weights: Tensor, count: int, device: torch.device) -> None:
    check_dense(weights, "weights")
    if weights.dim() != 1 or weights.shape[0] != count:
        raise ValueError(f"weights must have shape [{count}], but has {list(weights.shape)}")
    if weights.is_complex():
        raise TypeError(f"weights must have a real dtype, but has {weights.dtype}")
    if weights.device.type != "cpu" and weights.device != device:
        raise ValueError(f"weights must be on {device} like the vectors, but is on {weights.device}")


def check_weight(value: float | Tensor, name: str) -> float:
    value = to_float(value, name)
    if not 0 <= value < math.inf:  # comparisons: torch.compile traces them where a float is symbolic
        raise ValueError(f"{name} must be finite and not negative, not {value}")
    return value


TINY = 1e-200
"""Sum of weights below which products with ordinary values lose digits in fp64."""


def check_weights(weights: Tensor | Iterable[float], count: int) -> tuple[list[float], float]:
    """Return ``count`` weights as floats, and their sum, added up in order.

    Weights of a sum below :data:`TINY` are scaled: their products with the vectors would be subnormal.

    Raises:
        TypeError: the weights have no order (a set, a generator), or are no numbers.
        ValueError: the number of weights, a weight or the sum is wrong.
    """
    if isinstance(weights, Tensor):
        numbers = weights.tolist()
    elif isinstance(weights, Sequence) and not isinstance(weights, (str, bytes, bytearray)):
        numbers = list(weights)
    elif hasattr(weights, "__array__"):  # arrays of NumPy, series of pandas
        numbers = np.atleast_1d(np.asarray(weights)).tolist()
    else:
        raise TypeError(f"weights must be numbers in a list, or a tensor, not {type(weights).__name__}")
    if len(numbers) != count:
        raise ValueError(f"weights must have one value for each of the {count} vectors, not {len(numbers)}")
    values = [
        value if type(value) is float else _constant(value, f"weights[{position}]")
        for position, value in enumerate(numbers)
    ]
    total = 0.0
    for value in values:
        total += value
    # A NaN or infinite weight makes the sum NaN or infinite.
    if not (0 < total < math.inf and all(value >= 0 for value in values)):
        for position, value in enumerate(values):
            check_weight(value, f"weights[{position}]")
        raise ValueError(f"weights must have a positive, finite sum, not {total}")
    if total < TINY:
        values = near_one(values)
        return values, sum(values)
    return values, total


def _constant(value: object, name: str) -> float:
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} asks for a gradient, which numbers in a list do not get; give weights as one tensor")
    return to_float(value, name)


def kernel_weights(weights: Tensor | Sequence[float], count: int) -> Tensor | list[float]:
    """Return checked numbers, or an unchecked tensor off the CPU."""
    if isinstance(weights, Tensor) and weights.device.type != "cpu":
        return near_one(weights.detach()) if weights.dtype is torch.float64 else weights.detach()
    return check_weights(weights.detach() if isinstance(weights, Tensor) else weights, count)[0]


@overload
def near_one(weights: Tensor) -> Tensor: ...
@overload
def near_one(weights: Sequence[float]) -> list[float]: ...
def near_one(weights: Weights) -> Weights:
    """Scale weights by a power of two to about 1, so that sums and halves stay in range."""
    if not isinstance(weights, Tensor):
        exponent = math.frexp(max(weights))[1]
        return [math.ldexp(weight, -exponent) for weight in weights]
    wide = weights.double()
    largest = wide.detach().amax()
    exponents = (largest.view(torch.int64) >> 52) & 0x7FF  # with fp64's bias; the host reads nothing of a GPU
    return wide * ((2046 - exponents).clamp_min(1) << 52).view(torch.float64)


def check_call(
    name: str, vectors: Vectors, weights: Tensor | Sequence[float] | None, template: Tensor, count: int
) -> None:
    if isinstance(weights, Tensor):
        check_weights_tensor(weights, count, template.device)
    refuse_gradient(name, *rows_or_stack(vectors), weights)


def rows_or_stack(vectors: Vectors) -> Sequence[Tensor]:
    """Return the stack ``[M, P]`` alone, or M tensors ``[P]``."""
    return (vectors,) if isinstance(vectors, Tensor) else vectors


def count_of(vectors: Vectors) -> int:
    """Return M (``len`` of a tensor takes longer)."""
    return vectors.shape[0] if isinstance(vectors, Tensor) else len(vectors)


def size_of(vectors: Vectors) -> int:
    return vectors.shape[1] if isinstance(vectors, Tensor) else vectors[0].shape[0]


def rows_of(vectors: Vectors) -> list[Tensor]:
    return list(vectors.unbind(0)) if isinstance(vectors, Tensor) else list(vectors)


def eager(vectors: Vectors, *others: object) -> bool:
    """Apply ``backend.eager`` to the vectors and to all other tensors."""
    return backend.eager(*rows_or_stack(vectors), *(value for value in others if isinstance(value, Tensor)))


def as_tensor(weights: Tensor | Sequence[float], template: Tensor, count: int) -> Tensor:
    if isinstance(weights, Tensor):
        return weights
    values, _ = check_weights(weights, count)
    return (numbers_tensor if torch.compiler.is_compiling() else place_values)(values, template.device)


def direct_target(out: Tensor | None, vectors: Vectors) -> Tensor | None:
    """Return ``out`` if a kernel may write to it while it reads the vectors, else None."""
    if out is None or out.dtype not in backend.FLOATS or out.is_neg():
        return None
    size = out.shape[0]
    if size > 1 and out.stride(0) != 1:
        return None
    begin, end = out.data_ptr(), out.data_ptr() + size * out.element_size()
    for row in rows_of(vectors):
        place, stride = row.data_ptr(), row.stride(0)
        last = place + ((size - 1) * stride + 1) * row.element_size()
        in_place = place == begin and stride == 1 and out.dtype == row.dtype
        if not in_place and place < end and begin < last:
            return None
    return out


def copy_result(result: Tensor, out: Tensor) -> Tensor:
    """Copy ``result`` into ``out`` if necessary, and tell autograd."""
    if result is out:
        mark_written(out)
        return out
    with torch.no_grad():
        return out.copy_(result)
