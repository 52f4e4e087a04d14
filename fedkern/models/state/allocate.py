"""Memory for networks made on the meta device."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.process import machine

Layer = TypeVar("Layer", bound=nn.Module)

SMALL = 1 << 28
"""Bytes of a network up to which free memory is not checked, because a check takes most of a millisecond."""


def make_empty(kind: Callable[..., Layer], *arguments: int, device: torch.device | str | None = None) -> Layer:
    """Return a layer with uninitialised parameters, as ``torch.nn.utils.skip_init`` does."""
    module = kind(*arguments, device="meta")
    allocate(module)
    return module if device is None else module.to(device)


def linear_of(state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> nn.Linear:
    classes, width = state["weight"].shape
    head = make_empty(nn.Linear, width, classes, device=device)
    head.load_state_dict(state)
    return head


def allocate(module: nn.Module) -> None:
    """Give all parameters and buffers on the meta device uninitialised memory on the CPU.

    The first call of ``module.to_empty(device="cpu")`` would import sympy, which takes half a second.  Too little
    memory for the tensors and one copy raises UserError: the system would kill the process while the tensors are
    filled.
    """
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()) if tensor.is_meta)
    if size > SMALL and 2 * size > (free_bytes := machine.free_memory()):
        raise UserError(
            f"The network takes {size / 1e9:.1f} GB, twice that with its copies, and the machine has "
            f"{free_bytes / 1e9:.1f} GB free: take a smaller --width or --model."
        )
    tensors: dict[int, Tensor] = {}  # by the id of the tensor replaced, which layers may share
    for layer in module.modules():
        for group in (layer.named_parameters(recurse=False), layer.named_buffers(recurse=False)):
            for name, tensor in list(group):
                if not tensor.is_meta:
                    continue
                if id(tensor) not in tensors:
                    memory: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[id(tensor)] = nn.Parameter(memory, tensor.requires_grad) if is_parameter else memory
                setattr(layer, name, tensors[id(tensor)])
