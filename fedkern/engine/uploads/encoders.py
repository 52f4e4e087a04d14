"""The client's half of what an upload passes on its way to the server."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from fedkern.messages.states import State
from fedkern.methods.base import ClientId, Message

STATES = "encoders"
"""Entry of a client's stored state that holds the states of its encoders; a method never sees it."""


class Encoder(Protocol):
    """The client's half of a filter.

    It travels to where the client works, so it holds plain values and tensors.
    """

    @property
    def on_gpu(self) -> tuple[str, ...]:
        """Names of trained vectors that are encoded on the GPU and stay there.

        The others come to the host first.
        """
        ...

    def encode(self, leaving: Departure) -> tuple[Any, State | None]:
        """Change an upload before it leaves.

        Returns:
            What travels instead of the upload; and the figures of its check, where it was checked here, else None.
        """
        ...


@dataclass(frozen=True)
class Drift:
    """The norm of an update whose parameters stay on the GPU.

    Attributes:
        vector: the parameters as training left them, and their ``version`` then.
        norm: 0-d, in the host's memory.
    """

    vector: Tensor
    version: int
    norm: Tensor

    def of(self, vector: Tensor) -> Tensor | None:
        """Return the norm, if ``vector`` is what training left."""
        return self.norm if vector is self.vector and vector._version == self.version else None


@dataclass(frozen=True)
class Departure:
    """What leaves a client.

    Attributes:
        client: the client's id.
        sent: the message that the client was sent.
        message: what the client answered, not checked yet.
        drift: the norm of the update, where the client has measured it.
        state: what the encoder keeps at the client from round to round, like a client's state; dropped unless its
            filter ``keeps_client_state`` any.  It is as before the round again where the upload is lost or refused.
    """

    client: ClientId
    sent: Message
    message: Any
    drift: Drift | None = None
    state: State = field(default_factory=dict)


@dataclass(frozen=True)
class Encoders:
    """A client's encoders, one after another.

    Attributes:
        encoders: in the order in which they change the upload, each with the name of its state.  One without a name
            keeps none.
    """

    encoders: tuple[tuple[str, Encoder], ...]

    @property
    def on_gpu(self) -> tuple[str, ...]:
        """See :attr:`Encoder.on_gpu`: what stays there for every encoder."""
        (_, head), *tail = self.encoders
        return tuple(name for name in head.on_gpu if all(name in encoder.on_gpu for _, encoder in tail))

    def encode(self, leaving: Departure) -> tuple[Any, State | None]:
        """See :meth:`Encoder.encode`.

        ``leaving.state`` holds the states of all encoders by name.
        """
        message, checked = leaving.message, None
        for name, encoder in self.encoders:
            state = leaving.state.get(name, {}) if name else {}
            message, checked = encoder.encode(replace(leaving, message=message, state=state))
            if name and state:
                leaving.state[name] = state
        return message, checked
