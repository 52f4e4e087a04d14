"""Choice of the kernel for a call of conv_norm or conv_pool, and errors where a forced backend has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core import backend
from fedkern.ops._core.backend import eager, is_intercepted, select, select_ordinary, settle_choice

_autocast = torch.is_autocast_enabled


def choose_kernels(operator: str, *arguments: object) -> Any | None:
    """Return the kernel for an ordinary call, or None, and never raise."""
    try:
        kernel = select_ordinary(operator, *arguments)
        if kernel is None and not is_intercepted() and settle_choice(operator, "cpu"):
            kernel = select_ordinary(operator, *arguments)
    except (RuntimeError, ValueError):  # another backend is forced; torch.jit.trace is recording
        return None
    return None if kernel is None or _autocast("cpu") else kernel


def check_forced(operator: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if a backend was forced whose kernels cannot take these tensors."""
    operands = [tensor for tensor in tensors if tensor is not None]
    if not eager(*operands):
        if not backend.needs_reference(operator):
            backend.only_reference(operator, "torch.compile, modes and tensor subclasses")
    elif select(operator, *operands) is not None:
        where = "under autocast" if _autocast("cpu") else "of these sizes and strides, or at this ISA level"
        backend.not_forced(operator, "cpu", where)
