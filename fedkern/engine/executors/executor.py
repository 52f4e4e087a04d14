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
"""Function of a client id that returns a reader of the client's state at the beginning of the round, callable several
times within the round."""
Request = tuple[str, Phase, Message, Encoder | None]
"""Request to a client: name of the object whose ``client_update`` is called, exchange, message, encoder of answers."""


@dataclass
class Answer:
    """A client's answer to a message.

    Attributes:
        message: the client's upload, not checked yet; None if there is a ``problem``.
        warnings: diagnostics by name, of a client in another process.
        seconds: duration of the client's own work.
        marks: the run's features that the client's code has used (see `fedkern.engine.marks`).
        checked: figures of the upload's check, if an encoder has checked it.
        refused: why the upload cannot be read, as the end of a sentence about the upload, or empty.
        absent: why nothing came, as the end of a sentence about the client, or empty.
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

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message: ...


class Executor(Protocol):
    """Runs clients, each with its own state and a ``round_cache`` that lives as long as the round."""

    count: int
    """Number of this machine's processes in which clients work side by side."""

    remote: bool
    """Whether clients keep their data and states to themselves, so that none works in this process."""

    @property
    def here(self) -> Any: ...

    def answers(
        self, callee: str, phase: Phase, messages: Messages, encoders: Mapping[ClientId, Encoder] | None = None
    ) -> Iterator[Answer]:
        """Yield answers in the order of ``messages``, each as soon as all earlier ones arrived.

        Args:
            callee: name of the object whose ``client_update`` is called, ``"method"``, ``"pooling"`` or ``"figures"``.
            encoders: encoders of uploads, applied where the client works, by client.
        """
        ...

    def changed_state(self, client: ClientId) -> State | None:
        """Return the client's state if it changed since the last call, or in this round, else None."""
        ...

    def working(self) -> list[ClientId]:
        """Return the round's clients that are not forgotten."""
        ...

    def forget(self, client: ClientId) -> None: ...

    def end_round(self) -> None:
        """Drop all clients and their ``round_cache``."""
        ...

    def close(self) -> None: ...
