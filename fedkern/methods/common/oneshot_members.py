"""Networks of the clients' own architectures, and modules as flat vectors."""

from __future__ import annotations

import torch
from torch import nn

from fedkern import models
from fedkern.errors import UserError
from fedkern.methods.base import VECTORS, Method
from fedkern.methods.options import Options
from fedkern.methods.protocol import ClientId, Message
from fedkern.methods.roles import Architecture, Objective
from fedkern.models.network_registry import explain_unknown
from fedkern.models.state import personal_parts
from fedkern.models.users.user_models import channels_last
from fedkern.ops import FlatParameters

Architectures = tuple[tuple[str, int | None] | None, ...]
"""Architectures of the clients in turn: (name, width), or None for the run's own network. A user-defined network may
have no width."""


def parse_models(text: str) -> Architectures:
    """Parse ``"resnet8:16,cnn"`` into the clients' (name, width) in turn, None for the run's network."""
    if not text:
        return (None,)
    result: list[tuple[str, int | None] | None] = []
    for entry in text.split(","):
        name, colon, width = (part.strip() for part in entry.partition(":"))
        if name not in models.MODELS:
            raise UserError(f'Method option "models": {explain_unknown(entry.strip(), name)}')
        if colon and not (width.isdecimal() and int(width) > 0):
            raise UserError(f'Method option "models": the width of {name} must be a positive number, not "{width}".')
        result.append((name, int(width) if colon else models.MODELS[name].width))
    return tuple(result)


class OwnNetworks(Objective, Method):
    """Base of methods with an architecture per client (option ``models``)."""

    def __init__(self, options: Options | None = None, **values: object) -> None:
        super().__init__(options, **values)
        self.architectures = parse_models(self.options.models)

    def architecture(self, client: ClientId) -> Architecture:
        entry = self.architectures[client % len(self.architectures)]
        return {} if entry is None else {"model": entry[0], "width": entry[1]}


def flatten(module: nn.Module) -> FlatParameters:
    """Return the module as flat vectors, a built-in one in channels-last."""
    if channels_last(module):
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return personal_parts.flatten(module)


def copy_vectors(flat: FlatParameters) -> Message:
    """Return CPU copies of ``parameters`` fp32 [P], ``buffers`` fp32 [Q], ``integers`` int64 [R], if any."""
    tensors = {"parameters": flat.parameters, "buffers": flat.buffers, "integers": flat.integers}
    return {name: value.detach().cpu().clone() for name, value in tensors.items() if value.numel()}


def load(flat: FlatParameters, message: Message) -> nn.Module:
    """Write the vectors of a message into a module and return the module.

    Raises:
        ValueError: a vector is missing, or its size differs from the module's.
    """
    for name in VECTORS:
        if name not in message and getattr(flat, name).numel():
            raise ValueError(f"it sent no {name}")
    flat.load_vectors(message)
    return flat.module
