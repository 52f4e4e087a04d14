"""Protocol of an executor, the answer that it returns for a client, and the messages of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.local.training import Diverged
from fedkern.engine.uploads.encoders import Encoder
from fedkern.errors import ClientFailed
from fedkern.messages.states import State
from fedkern.methods import method_registry
from fedkern.methods.base import ClientId, Message, Messages, Method, Phase
from fedkern.models import ModelEntry
from fedkern.ops._core import backend
from fedkern.process.torch_modes import modes

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


@dataclass(frozen=True)
class Setup:
    """Everything that a worker needs about the run, sent once.

    Attributes:
        handlers: objects whose ``client_update`` may be called, by name.
        methods, entries: the user-defined method class and networks, by name.
        backend: the forced backend of the operators, or None.
        isa: the ISA level of the CPU core, "none" without a core.
        modes: process-wide settings of PyTorch that change bits.
    """

    context: RunContext
    handlers: dict[str, Handler]
    methods: dict[str, type[Method]]
    entries: tuple[ModelEntry, ...]
    backend: str | None
    isa: str
    modes: dict[str, Any]

    @classmethod
    def of(cls, context: RunContext, handlers: Mapping[str, Handler]) -> Setup:
        entries, forced, name = context.networks.added_models, backend.forced_backend(), context.config.method
        methods = {name: method_registry.GIVEN[name]} if name in method_registry.GIVEN else {}
        return cls(context, dict(handlers), methods, entries, forced, backend.active_isa(), modes())


@dataclass(frozen=True)
class Job:
    """Job of a worker: one client answers one message.

    Attributes:
        state: the client's state at the beginning of the round, if the client is new to this worker; else None.
        played: the client's earlier messages of the round, which a lost worker answered, to replay first.
    """

    client: int
    request: Request
    state: State | None = None
    played: tuple[Request, ...] = ()


@dataclass
class Done:
    """Reply to a job: an exception, or the answer and the client's state if the job changed it."""

    answer: Any
    state: State | None = None
    failed: Exception | None = None
    size: int = 0


@dataclass(frozen=True)
class Notice:
    """Progress of a long step, passed on at once."""

    text: str


@dataclass(frozen=True)
class Clear:
    """Request to forget memory files, to which no later packet will refer."""

    round_over: bool = False


@dataclass(frozen=True)
class Forget:
    """Request to drop a client."""

    client: int
