"""Moments of a training step, to compare with and to go back to: values of tensors and global random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkern.ops._core.layout import dense_stride


class Moment:
    """The values that tensors have now, and the states of the global generators."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self._values = [tensor.detach().clone() for tensor in tensors]
        self._gpu = {device: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        self._host = _generators()

    def drawn(self) -> str:
        """Whose generator on the host has moved since, or ""."""
        now = _generators()
        moved = [name for name in ("Python's", "NumPy's") if self._host[name] != now[name]]
        return moved[0] if moved else "" if torch.equal(self._host["torch's"], now["torch's"]) else "torch's"

    def holds(self) -> bool:
        """Whether the tensors have the same bits now."""
        return all(alike(tensor.detach(), value) for tensor, value in zip(self._tensors, self._values, strict=True))

    def restore(self) -> None:
        """Makes everything as it was."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.detach().copy_(value)
        for device, state in self._gpu.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._host["Python's"])
        np.random.set_state(self._host["NumPy's"])  # noqa: NPY002
        torch.set_rng_state(self._host["torch's"])


def _generators() -> dict[str, Any]:
    kind, words, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "Python's": random.getstate(),
        "NumPy's": (kind, np.asarray(words).tolist(), *rest),
        "torch's": torch.get_rng_state(),
    }


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape, dtype and layout have the same bits."""
    return torch.equal(in_memory(one).view(torch.uint8), in_memory(other).view(torch.uint8))


def in_memory(tensor: Tensor) -> Tensor:
    """[n], a tensor's elements in the order of :func:`dense_stride`: a view, if they lie so."""
    if not tensor.is_contiguous() and (stride := dense_stride(tensor)) != tensor.stride():
        tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))
