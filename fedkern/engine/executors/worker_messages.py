"""Messages between the process of a run and its workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedkern.engine.context import RunContext
from fedkern.engine.executors.executor import Handler, Request
from fedkern.messages.states import State
from fedkern.methods import method_registry
from fedkern.methods.base import Method
from fedkern.models import ModelEntry
from fedkern.ops._core import backend
from fedkern.process.torch_modes import modes


@dataclass(frozen=True)
class Setup:
    """Everything that a worker needs about the run, sent once.

    Attributes:
        context: the settings, the federated data and what the records may tell.
        handlers: objects whose ``client_update`` may be called, by name.
        methods: the class that a script gave as the run's method, by name.
        entries: entries of ``fedkern.models.MODELS`` that the user added, and that the settings name.
        backend: the forced backend of the operators; None where none is.
        isa: the ISA level of the CPU core, "none" where there is no core.
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
        """Return what clients need in order to work elsewhere as they would in this process."""
        entries, forced, name = context.networks.added_models, backend.forced_backend(), context.config.method
        methods = {name: method_registry.GIVEN[name]} if name in method_registry.GIVEN else {}
        return cls(context, dict(handlers), methods, entries, forced, backend.active_isa(), modes())


@dataclass(frozen=True)
class Job:
    """A worker's job: one client answers one message.

    Attributes:
        client: the client's id.
        request: the message.
        state: the client's state at the beginning of the round, where the client begins its round in this worker; else
            None.
        played: the client's earlier messages of the round, which a lost worker answered; they are played again first.
    """

    client: int
    request: Request
    state: State | None = None
    played: tuple[Request, ...] = ()


@dataclass
class Done:
    """A worker's reply to a job: the answer and, if the job changed it, the client's state; or an exception.

    The run's process notes in ``size`` how many bytes of tensors have come.
    """

    answer: Any
    state: State | None = None
    failed: Exception | None = None
    size: int = 0


@dataclass(frozen=True)
class Notice:
    """Progress of something long, passed on at once."""

    text: str


@dataclass(frozen=True)
class Clear:
    """Tells a worker that no later packet will refer to the memory files of earlier packets.

    Attributes:
        round_over: whether the clients of this round work no more.
    """

    round_over: bool = False


@dataclass(frozen=True)
class Forget:
    """Tells a worker to drop a client, which works no more in this round."""

    client: int
