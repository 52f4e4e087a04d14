"""Protocol of an executor, and the answer that it returns for a client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedkern.engine.client import Client
from fedkern.engine.local.training import Diverged
from fedkern.engine.uploads.encoders import Encoder
from fedkern.errors import ClientFailed
from fedkern.messages.states import State
from fedkern.methods.base import ClientId, Message, Messages, Phase

States = Callable[[ClientId], Callable[[], State]]
"""Function of a client id.  It returns a reader of the client's state at the beginning of the round; the reader may be
called several times within the round."""
Request = tuple[str, Phase, Message, Encoder | None]
"""What a client answers: name of the asker, exchange, message, and encoder of the answer."""


@dataclass
class Answer:
    """A client's answer to a message.

    Attributes:
        client: the client's id.
        message: the client's upload, not checked yet; None where there is a ``problem``.
        problem: why there is no upload.
        report: named figures of the client.
        warnings: diagnostics by name, from a client in a worker process; empty where this process has them already.
        seconds: duration of the client's own work.
        marks: what the client's code has used of the run (see `fedkern.engine.marks`).
        checked: figures of the upload's check, where an encoder has checked it; else None.
        refused: why what came cannot be read as an answer, as the end of a sentence about the upload; empty: it can.
        absent: why nothing came, as the end of a sentence about the client; empty: something came.
    """

    client: ClientId
    message: Any = None
    problem: Diverged | ClientFailed | None = None
    report: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    marks: frozenset[str] = frozenset()
    checked: dict[str, Any] | None = None
    refused: str = ""
    absent: str = ""


class Handler(Protocol):
    """An object whose ``client_update`` answers for a client."""

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        """Return the client's upload."""
        ...


class Executor(Protocol):
    """Runs clients.

    A client works with its own state and ``round_cache``.  The ``round_cache`` lives as long as the round.
    """

    count: int
    """Number of this machine's processes in which clients work side by side."""

    remote: bool
    """Whether clients keep their data and states to themselves: no client ever works in this process."""

    @property
    def here(self) -> Any:
        """The :class:`~fedkern.engine.executors.serial.Serial` of this process."""
        ...

    def answers(
        self, asker: str, phase: Phase, messages: Messages, encoders: Mapping[ClientId, Encoder] | None = None
    ) -> Iterator[Answer]:
        """Yield the clients' answers in the order of ``messages``, each as soon as it and all before it are there.

        Args:
            asker: name of the object whose ``client_update`` is called, ``"method"``, ``"pooling"`` or ``"figures"``.
            phase: the exchange.
            encoders: changes a client's upload where the client works, by client; none where it travels as it is.
        """
        ...

    def changed_state(self, client: ClientId) -> State | None:
        """Return the client's state if it has changed since the last call, or since the round began; else None."""
        ...

    def working(self) -> list[ClientId]:
        """Return the clients of this round that have not been forgotten."""
        ...

    def forget(self, client: ClientId) -> None:
        """Drop a client that works no more in this round."""
        ...

    def end_round(self) -> None:
        """Drop all clients and their ``round_cache``."""
        ...

    def close(self) -> None:
        """End the processes that were started, whatever they are doing."""
        ...
