"""What an executor is, and what it brings back from a client."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedkern.engine.local import Diverged
from fedkern.errors import ClientFailed, UserError
from fedkern.methods.base import ClientId, Message, Step

States = Callable[[ClientId], Callable[[], dict[str, Any]]]
"""Of a client, what reads its state as it is when the round begins; it may be asked for again within the round."""


@dataclass
class Answer:
    """What a client has made of a message.

    Attributes:
        client: whose.
        message: its upload, whatever it is; None where there is a ``problem``.
        problem: why there is none.
        report: named figures of the client.
        warnings: diagnostics by name, where they were not given to this process.
        seconds: of the client's own work.
        flops: floating-point operations in it (see :class:`~fedkern.models.flops.Counting`).
    """

    client: ClientId
    message: Any = None
    problem: Diverged | ClientFailed | None = None
    report: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    flops: int = 0


class Executor(Protocol):
    """Lets clients work.

    A method's client is asked in its own state and ``round_cache``, which lives as long as the round.
    """

    count: int
    """Processes that clients work in side by side."""

    @property
    def here(self) -> Any:
        """The :class:`~fedkern.engine.executors.serial.Serial` of this process."""
        ...

    def answers(self, asker: str, step: Step, messages: Mapping[ClientId, Message]) -> Iterator[Answer]:
        """The answers of these clients, in this order, each as soon as it and those before it are there.

        Args:
            asker: who asks, ``"method"`` or ``"pooling"``.
            step: the exchange.
            messages: what every client is sent.

        Raises:
            UserError: a client found something that the user can put right.
        """
        ...

    def changed(self, client: ClientId) -> dict[str, Any] | None:
        """The client's state where it is not what it was when this was asked last, or the round began."""
        ...

    def working(self) -> list[ClientId]:
        """The clients of this round that have not been forgotten."""
        ...

    def forget(self, client: ClientId) -> None:
        """The client works no more in this round."""
        ...

    def end_round(self) -> None:
        """Forgets all clients, and what lived between the exchanges of the round."""
        ...

    def close(self) -> None:
        """Ends what was started, whatever it is doing."""
        ...


def failure(client: ClientId, error: Exception) -> ClientFailed:
    """What a client's exception becomes, or the exception itself where it is not the client's.

    Raises:
        Exception: ``error``, where the user or the machine is to blame: no client can be left out for that.
    """
    text = str(error)
    if (
        isinstance(error, (UserError, MemoryError, OSError))
        or "allocate memory" in text
        or "OutOfMemory" in repr(error)
    ):
        raise error
    lines = "".join(traceback.format_exception(error))
    failed = ClientFailed(client, f"{type(error).__name__}: {text}" if text else type(error).__name__, lines)
    failed.__cause__ = error
    return failed
