"""A network whose parameters, buffers and gradients are flat vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern import ops


class Network:
    """A module on a device, flattened; convolutional weights are kept channels-last, so images should be too.

    Attributes:
        module: the network.
        parameters: fp32 [P], a view of all parameters.
        buffers: fp32 [Q], a view of all floating buffers (running statistics).
        statistics: False when the buffers hold nothing meaningful, so that eval mode must use the batch's statistics.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        if any(p.dim() == 4 for p in module.parameters()):
            module = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        else:
            module = module.to(device)
        self.module: Any = module
        self._flat = ops.FlatParameters(module)
        self.parameters: Tensor = self._flat.parameters
        self.buffers: Tensor = self._flat.buffers
        self._gradients: Tensor | None = None
        self.statistics = True

    @property
    def gradients(self) -> Tensor:
        """fp32 [P], a view of all gradients; every parameter's ``.grad`` is set to its part of it."""
        if self._gradients is None:
            self._gradients = self._flat.gradients()
        return self._gradients

    def read(self) -> dict[str, Tensor]:
        """Copies of ``parameters`` fp32 [P], ``buffers`` fp32 [Q], ``integers`` int64 [R]; empty ones are left out."""
        result = {"parameters": self.parameters.clone()}
        if self.buffers.numel():
            result["buffers"] = self.buffers.clone()
        integers = self._flat.integers
        if integers.numel():
            result["integers"] = integers
        return result

    def write(self, message: Mapping[str, Tensor]) -> None:
        """Copies the vectors of a message into the network.

        Raises:
            ValueError: a vector has another size than the network's.
        """
        if "parameters" in message:
            self._flat.load_parameters(message["parameters"])
        if "buffers" in message:
            self._flat.load_buffers(message["buffers"])
        if "integers" in message:
            self._flat.load_integers(message["integers"])

    def eval_mode(self) -> None:
        """Puts the module in eval mode; without meaningful running statistics batch norm uses the batch's own."""
        self.module.eval()
        for layer in self.module.modules():
            if isinstance(layer, _BatchNorm):
                layer.track_running_stats = self.statistics
                layer.training = not self.statistics

    def train_mode(self) -> None:
        """Puts the module in train mode."""
        self.module.train()
        for layer in self.module.modules():
            if isinstance(layer, _BatchNorm):
                layer.track_running_stats = True

    def freeze(self) -> None:
        """Gradients reach neither the parameters nor, through them, anything else."""
        self.module.requires_grad_(False)

    def state_dict(self) -> dict[str, Tensor]:
        """The module's state dict as contiguous copies on the CPU, each with storage of its own."""
        return {
            name: value.detach().cpu().contiguous().clone(memory_format=torch.contiguous_format)
            for name, value in self.module.state_dict().items()
        }


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Runs with this many CPU threads and restores the caller's number: it changes the bits of a run."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
