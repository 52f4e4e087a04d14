"""Checks of numbers and tensors given to operators. Every error message names the argument."""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkern.ops._core import backend
from fedkern.ops._core.private_torch import increment_version

# Longest text of a value in an error message: a number may have thousands of digits.
_MAX_CHARACTERS = 80

# Most steps of the exact search for shared memory, which tensors of two axes rarely need. A search that needs more
# counts as shared memory.
_SEARCH = 100_000


def show_value(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."


def python_number(value: object) -> Any:
    """Convert a real number of another type, such as NumPy's, to Python's, and nothing else."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def to_float(value: object, name: str, kind: str = "a number") -> float:
    """Return a real number of any type, or a tensor of one element, as a float.

    Raises:
        TypeError: ``value`` is not one real number.
        ValueError: ``value`` is too large for a float.
    """
    if type(value) is float:
        return value
    complex_ = isinstance(value, (complex, np.complexfloating)) or (isinstance(value, Tensor) and value.is_complex())
    if not complex_ and not isinstance(value, (str, bytes, bytearray, np.ndarray, np.bool_)):
        try:
            return float(value)  # type: ignore[arg-type]
        except OverflowError:
            raise ValueError(f"{name} must be a number that a float can hold, not {show_value(value)}") from None
        except (TypeError, ValueError, RuntimeError):
            pass
    raise TypeError(f"{name} must be {kind}, not {'complex' if complex_ else type(value).__name__}")


def check_dense(tensor: Tensor, name: str) -> None:
    if tensor.is_quantized:
        raise TypeError(f"{name} must be a dense tensor, not a quantised one; .dequantize() makes one")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, not a {kind} one; .to_dense() makes one of a sparse tensor")


def check_number(value: object, name: str, high: float = math.inf, *, above: bool = False) -> float:
    if isinstance(value, (bool, Tensor)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    number = to_float(value, name)
    # Comparisons, and not math.isinf: torch.compile traces them where a float is symbolic.
    if not (0 <= number <= high) or number == math.inf or (above and number == 0):
        bound = "greater than 0" if above else "at least 0"
        raise ValueError(
            f"{name} must be {bound}{'' if math.isinf(high) else f' and at most {high:g}'}, not {show_value(value)}"
        )
    return number


def check_count(value: int, name: str, low: int, high: int | None = None) -> int:
    value = python_number(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bound}, not {show_value(value)}")
    return value


def check_flag(value: bool, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {type(value).__name__}")


def refuse_gradient(name: str, *arguments: object) -> None:
    recorded = torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments)
    if recorded or backend.has_tangent(arguments):
        raise ValueError(f"{name} has no gradient; call it under torch.no_grad(), or detach its arguments")


def mark_written(*tensors: Tensor | None) -> None:
    """Tell autograd that a kernel has written to ``tensors``."""
    increment_version([tensor for tensor in tensors if tensor is not None and not tensor.is_inference()])


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Convert 16-bit tensors to float32 under autocast, as torch's losses do."""
    sample = tensors[0]
    kind = None if not isinstance(sample, Tensor) else "cpu" if sample.is_cpu else "cuda" if sample.is_cuda else None
    if kind is None or not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(
        x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x for x in tensors
    )


def check_tensor(tensor: object, name: str, kind: str = "a tensor") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be {kind}, but got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        check_dense(tensor, name)


def check_floating(tensor: Tensor, name: str, kind: str = "a tensor") -> None:
    check_tensor(tensor, name, kind)
    if tensor.dtype not in backend.FLOATS:
        raise TypeError(f"{name} must have dtype float32, float64, bfloat16 or float16, but has {tensor.dtype}")


def check_device(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, but is on {tensor.device}")


def check_memory(tensor: Tensor, name: str) -> None:
    """Raise RuntimeError if the storage was freed, where a kernel would read address 0."""
    if not tensor.data_ptr() and tensor.numel():
        raise RuntimeError(
            f"{name} has {tensor.numel()} elements and no memory: its storage was freed (resize_(0)); "
            "keep it until the last backward pass that reads it"
        )


class _Memory:
    """A tensor's address, shape and strides for NumPy, which does not read the values."""

    def __init__(self, tensor: Tensor) -> None:
        item = tensor.element_size()
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(step * item for step in tensor.stride()),
            "typestr": f"|V{item}",
            "version": 3,
        }


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Return whether elements of ``x`` and ``y`` overlap in memory, exactly for all strides."""
    if not x.numel() or not y.numel() or x.device != y.device:
        return False
    (x_begin, x_end), (y_begin, y_end) = memory_ends(x), memory_ends(y)
    if x_begin >= y_end or y_begin >= x_end:
        return False
    if x.is_contiguous() and y.is_contiguous():
        return True
    a, b = np.asarray(_Memory(x)), np.asarray(_Memory(y))
    try:
        return bool(np.shares_memory(a, b, max_work=_SEARCH))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def memory_ends(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor with elements, and the address behind its last element."""
    begin = tensor.data_ptr()
    span = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (span + 1) * tensor.element_size()
