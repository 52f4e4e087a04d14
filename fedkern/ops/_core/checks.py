"""Checks of numbers and tensors given to operators; every error message names the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Longest text of a value in an error message: a number may have thousands of digits.
_MOST_CHARACTERS = 80


def shown(value: object) -> str:
    """``value`` as error messages show it, cut short if long."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def real(value: Any, name: str, wanted: str = "a number") -> float:
    """``value``, a real number of any type or a tensor of one element, as a float.

    Raises:
        TypeError: ``value`` is something else: text, None, a complex number, several numbers.
        ValueError: ``value`` is too large for a float.
    """
    if type(value) is float:
        return value
    complex_ = isinstance(value, (complex, np.complexfloating)) or (isinstance(value, Tensor) and value.is_complex())
    if not complex_ and not isinstance(value, (str, bytes, bytearray, np.ndarray)):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} must be a number that a float can hold, not {shown(value)}") from None
        except (TypeError, ValueError, RuntimeError):
            pass
    raise TypeError(f"{name} must be {wanted}, not {'complex' if complex_ else type(value).__name__}")


def check_dense(tensor: Tensor, name: str) -> None:
    """Raises TypeError for tensors without strides: sparse, nested and others."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, not a {kind} one; .to_dense() makes one of a sparse tensor")
