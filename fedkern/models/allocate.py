"""Networks made on the meta device get memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def allocate(module: nn.Module) -> None:
    """Gives every parameter and buffer that is on the meta device uninitialised memory on the CPU.

    As ``module.to_empty(device="cpu")``, whose first call imports torch's symbolic shapes and with them sympy: half a
    second of every command and of every worker.
    """
    made: dict[int, Tensor] = {}  # by what it replaces: layers may share it
    for layer in module.modules():
        for named in (layer.named_parameters(recurse=False), layer.named_buffers(recurse=False)):
            for name, tensor in list(named):
                if not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    memory: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(memory, tensor.requires_grad) if is_parameter else memory
                setattr(layer, name, made[id(tensor)])
