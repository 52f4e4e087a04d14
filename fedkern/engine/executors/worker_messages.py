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
