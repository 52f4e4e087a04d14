"""Networks made on the meta device get memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


def uninitialised(kind: Callable[..., Layer], *arguments: int, device: torch.device | str | None = None) -> Layer:
    """A layer whose parameters hold whatever was in memory, as ``torch.nn.utils.skip_init`` makes it.

    Args:
        kind: its class, or what makes it on the ``device`` that it is given.
        arguments: the first ones of ``kind``.
        device: where it shall be; None is the CPU.
    """
    made = kind(*arguments, device="meta")
    allocate(made)
    return made if device is None else made.to(device)


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
