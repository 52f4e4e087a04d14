"""Whether a kernel serves a call of conv_norm or conv_pool, and what is said where it was forced and does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core import backend
from fedkern.ops._core.backend import eager, is_intercepted, ready, select, settle

_autocast = torch.is_autocast_enabled


def choose_kernels(operator: str, *arguments: object) -> Any | None:
    """Return the kernel that serves an ordinary call.

    None where there is none. Never raises.
    """
    try:
        kernel = ready(operator, *arguments)
        if kernel is None and not is_intercepted() and settle(operator, "cpu"):
            kernel = ready(operator, *arguments)
    except (RuntimeError, ValueError):  # another backend is forced; torch.jit.trace is recording
        return None
    return None if kernel is None or _autocast("cpu") else kernel


def check_forced(operator: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if a backend was forced, and not the reference, which serves these tensors."""
    operands = [tensor for tensor in tensors if tensor is not None]
    if not eager(*operands):
        if not backend.needs_reference(operator):
            backend.only_reference(operator, "torch.compile, modes and tensor subclasses")
    elif select(operator, *operands) is not None:
        where = "under autocast" if _autocast("cpu") else "of these sizes and strides, or at this ISA level"
        backend.not_forced(operator, "cpu", where)
