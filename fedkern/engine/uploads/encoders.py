"""Encoders: the client's half of the upload filters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from fedkern.messages.states import State
from fedkern.methods.base import ClientId, Message

STATES = "encoders"
"""Entry of a client's stored state with the states of its encoders, hidden from methods."""


class Encoder(Protocol):
    """The client's half of a filter.

    It travels to where the client works, so it holds plain values and tensors.
    """

    @property
    def on_gpu(self) -> tuple[str, ...]:
        """Names of trained vectors that are encoded on the GPU and stay there.

        Others come to the host first.
        """
        ...

    def encode(self, leaving: Departure) -> tuple[Any, State | None]:
        """Change an upload before it leaves.

        Returns:
            The upload to send, and the figures of its check, or None if the encoder does not check.
        """
        ...


@dataclass(frozen=True)
class Drift:
    """Norm of an update whose parameters stay on the GPU.

    Attributes:
        vector: the parameters after training, with their ``version``.
        norm: 0-d, in the host's memory.
    """

    vector: Tensor
    version: int
    norm: Tensor

    def of(self, vector: Tensor) -> Tensor | None:
        return self.norm if vector is self.vector and vector._version == self.version else None


@dataclass(frozen=True)
class Departure:
    """Upload of a client before it leaves.

    Attributes:
        sent: the message that the client was sent.
        message: the client's answer, not checked yet.
        drift: the norm of the update, if measured.
        state: the encoder's state at the client from round to round, dropped unless its filter ``keeps_client_state``.
            If the upload is lost or refused, the state is reset to that before the round.
    """

    client: ClientId
    sent: Message
    message: Any
    drift: Drift | None = None
    state: State = field(default_factory=dict)


@dataclass(frozen=True)
class Encoders:
    """A client's encoders in their order, each with the name of its state, or "" without state.

    Attributes:
        share: share of its local steps that the client does (see :class:`ExchangeRequest`).
    """

    encoders: tuple[tuple[str, Encoder], ...]
    share: float = 1.0

    @property
    def on_gpu(self) -> tuple[str, ...]:
        kept = [getattr(encoder, "on_gpu", ()) for _, encoder in self.encoders]  # a user's may have none
        return tuple(name for name in next(iter(kept), ()) if all(name in names for names in kept))

    def encode(self, leaving: Departure) -> tuple[Any, State | None]:
        message, checked = leaving.message, None
        for name, encoder in self.encoders:
            state = leaving.state.get(name, {}) if name else {}
            message, checked = encoder.encode(replace(leaving, message=message, state=state))
            if name and state:
                leaving.state[name] = state
        return message, checked
