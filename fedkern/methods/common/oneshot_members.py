"""Networks that clients upload once: their flat vectors, the check of an upload, and the rebuilt modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fedkern import models
from fedkern.errors import UserError
from fedkern.methods.base import VECTORS, Method, vectors_of
from fedkern.methods.protocol import ClientId, Message, Phase, Upload
from fedkern.methods.uploads import all_finite
from fedkern.models import personal
from fedkern.models.registry import unknown
from fedkern.models.user_models import channels_last
from fedkern.ops import FlatParameters

Architectures = tuple[tuple[str, int | None] | None, ...]
"""Architectures of the clients in turn: (name, width), or None for the run's own network; networks that users bring may
have no width."""

PROBES = 16
"""Number of noise images on which a member's logits must be finite before the server accepts the member."""


def parse_models(text: str) -> Architectures:
    """Parses ``"resnet8:16,cnn"`` into (name, width) of the clients' networks in turn.

    An empty text means the run's own network for all clients.

    Raises:
        UserError: an unknown network, or a width that is not a positive number.
    """
    if not text:
        return (None,)
    result: list[tuple[str, int | None] | None] = []
    for entry in text.split(","):
        name, colon, width = (part.strip() for part in entry.partition(":"))
        if name not in models.MODELS:
            raise UserError(f'Method option "models": {unknown(entry.strip(), name)}')
        if colon and not (width.isdecimal() and int(width) > 0):
            raise UserError(f'Method option "models": the width of {name} must be a positive number, not "{width}".')
        result.append((name, int(width) if colon else models.MODELS[name].width))
    return tuple(result)


def architecture(architectures: Architectures, client: int) -> dict[str, Any]:
    """Arguments of ``build`` and ``network`` for a client's network.

    Empty for the run's own network.
    """
    entry = architectures[client % len(architectures)]
    return {} if entry is None else {"model": entry[0], "width": entry[1]}


class OwnNetworks(Method):
    """Methods whose clients may have different architectures, given by the option ``models``."""

    def __init__(self, options: Any = None, **values: Any) -> None:
        super().__init__(options, **values)
        self.architectures = parse_models(self.options.models)

    def architecture(self, client: ClientId) -> dict[str, Any]:
        return architecture(self.architectures, client)


def flatten(module: nn.Module) -> FlatParameters:
    """The module as flat vectors, in the engine's memory layout (convolutions of fedkern's networks channels-last)."""
    if channels_last(module):
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return personal.flatten(module)


def vectors(flat: FlatParameters) -> Message:
    """CPU copies of ``parameters`` fp32 [P], ``buffers`` fp32 [Q], ``integers`` int64 [R], without empty vectors."""
    tensors = {"parameters": flat.parameters, "buffers": flat.buffers, "integers": flat.integers}
    return {name: value.detach().cpu().clone() for name, value in tensors.items() if value.numel()}


def load(flat: FlatParameters, message: Message) -> nn.Module:
    """Writes the vectors of a message into a module and returns the module.

    Raises:
        ValueError: a vector is missing, or its size differs from the module's.
    """
    for name in VECTORS:
        if name not in message and getattr(flat, name).numel():
            raise ValueError(f"it sent no {name}")
    flat.load_vectors(message)
    return flat.module


class Members:
    """The uploaded networks in ``server.state["members"]``: vectors, number of samples and class counts by client id.

    Args:
        place: the server, or a client that received the networks.
        architectures: the clients' networks in turn, see :func:`parse_models`.
    """

    def __init__(self, place: Any, architectures: Architectures = (None,)) -> None:
        self.server, self.architectures = place, architectures
        self._build = place.build if hasattr(place, "build") else place.network

    def build(self, client: int) -> nn.Module:
        """A fresh network of the client's architecture."""
        return self._build(**architecture(self.architectures, client))

    def check(self) -> None:
        """Builds every architecture once.

        Raises UserError where one does not fit the images.
        """
        for client in range(len(self.architectures)):
            self.build(client)

    def collect(self, phase: Phase, uploads: Iterable[Upload]) -> Iterator[Upload]:
        """Stores and yields every upload whose network has finite logits, and refuses the others.

        Raises:
            UserError: an upload is refused with ``--on-nan stop``, or no upload is left.
        """
        members = self.server.state["members"] = {}
        for upload in uploads:
            if not self._sound(phase, upload):
                k = upload.client_id
                self.server.refuse(k, f"The network of client {k} cannot be used: its logits are not finite")
                continue
            members[upload.client_id] = {**vectors_of(upload.message), "samples": upload.samples}
            if "classes" in upload.message:
                members[upload.client_id]["classes"] = upload.message["classes"].cpu()
            yield upload
        if not members:
            raise UserError("Every client's network was refused: lower --lr, or set --clip-norm.")

    @torch.no_grad()
    def _sound(self, phase: Phase, upload: Upload) -> bool:
        """Whether the network has finite logits on noise."""
        module = self.build(upload.client_id)
        load(flatten(module), upload.message)
        return all_finite(module.eval()(self.server.noise(PROBES, self.server.rng("probe", phase))))

    def clients(self) -> list[int]:
        """The ids of the members, ascending."""
        return sorted(self.server.state["members"])

    def messages(self) -> dict[int, Message]:
        """Flat vectors of every member, by client id."""
        members = self.server.state["members"]
        return {k: vectors_of(members[k]) for k in self.clients()}

    def modules(self, messages: dict[int, Message] | None = None) -> list[nn.Module]:
        """The members' networks in eval mode, in ascending order of client ids."""
        messages = self.messages() if messages is None else messages
        return [load(flatten(self.build(k)), messages[k]).eval() for k in sorted(messages)]
