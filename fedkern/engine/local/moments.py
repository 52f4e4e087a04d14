"""Snapshots of a training step, to compare with and to return to."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkern.ops._core.layout import dense_stride
from fedkern.streams import forget_spare_number, generator_states, restore_generators


class Snapshot:
    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self._values = [tensor.detach().clone() for tensor in tensors]
        self._gpu = {device: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        forget_spare_number()
        self._host = generator_states()

    def moved_generator(self) -> str:
        """Return the name of a host generator that has moved since, or ""."""
        current = generator_states()
        return next((name for name, state in self._host.items() if state != current[name]), "")

    def holds(self) -> bool:
        return all(
            has_same_bits(tensor.detach(), value) for tensor, value in zip(self._tensors, self._values, strict=True)
        )

    def restore(self) -> None:
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.detach().copy_(value)
        for device, state in self._gpu.items():
            torch.cuda.set_rng_state(state, device)
        restore_generators(self._host)


def has_same_bits(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors of one shape, dtype and layout have the same bits."""
    return torch.equal(in_memory(left).view(torch.uint8), in_memory(right).view(torch.uint8))


def in_memory(tensor: Tensor) -> Tensor:
    """Return a tensor's elements [n] in the order of :func:`dense_stride`, if possible as a view."""
    if not tensor.is_contiguous() and (stride := dense_stride(tensor)) != tensor.stride():
        tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))
