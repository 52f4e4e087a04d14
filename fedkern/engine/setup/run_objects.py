"""Objects of a run that its loop, parts and filters read, and its folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import nn

from fedkern.data.identity import data_fingerprint
from fedkern.data.types import FederatedData
from fedkern.engine.batches.reader import Reader
from fedkern.engine.client_privacy import ClientPrivacy
from fedkern.engine.clients import compare_teachers
from fedkern.engine.context import RunContext
from fedkern.engine.executors.executor import Executor, Handler
from fedkern.engine.executors.serial import Serial
from fedkern.engine.figures import own_figures
from fedkern.engine.hooks import Hooks, MethodCode
from fedkern.engine.local.networks import Networks
from fedkern.engine.local.samples import Samples
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.engine.notices import Notices
from fedkern.engine.participation import Participation
from fedkern.engine.rounds.client_states import ClientStates
from fedkern.engine.rounds.ledger import Ledger
from fedkern.engine.rounds.progress import Progress
from fedkern.engine.rounds.round_log import RoundLog
from fedkern.engine.rounds.timing import Timing
from fedkern.engine.server import Server
from fedkern.engine.store.background_writer import BackgroundWriter
from fedkern.engine.store.checkpoints import Checkpoints, Entry
from fedkern.engine.store.data_facts import DataFacts
from fedkern.engine.store.record_files import Metrics
from fedkern.engine.store.releases import Releases
from fedkern.engine.store.resuming import change_rounds, check_data_and_plan, facts_of
from fedkern.listeners.listener_group import ListenerGroup
from fedkern.messages.states import State
from fedkern.methods.base import Method, Round
from fedkern.methods.common.pooling import Pooling
from fedkern.privacy import Guarantee
from fedkern.settings.config import RunConfig
from fedkern.settings.run_format import read_code

Remote = Callable[["RunObjects"], Executor]
"""Makes the executor of remote clients (see :attr:`Executor.remote`)."""


@dataclass(frozen=True)
class Request:
    """Request for a run beside its settings (see :func:`fedkern.engine.run.run`)."""

    out: Path
    data: FederatedData | None = None
    script: ScriptObjects = ScriptObjects()
    trusted: Collection[str] = ()
    resume: bool = False
    rounds: int | None = None
    profile: bool = False
    predictions: bool = False
    remote: Remote | None = None
    at_once: int = 1

    @property
    def has_samples(self) -> bool:
        return self.data is None or self.remote is None


class RunStore:
    """The folder of a run.

    Attributes:
        releases: digests of releases, or None without a guarantee.
        entry: the checkpoint from which the run continues, or None.
        facts: fingerprints that a resumed run is compared with; ``"data"`` is of the data that the server knows.
        check_lock: raises if another process has taken over the folder.
        part_states: returns the states of all parts and filters for a checkpoint.
    """

    def __init__(self, out: Path, private: bool) -> None:
        self.out, self.metrics = out, Metrics(out)
        self.checkpoints = Checkpoints(out, BackgroundWriter())
        self.releases = Releases(self.checkpoints.folder) if private else None
        self.entry: Entry | None = None
        self.facts: State = {}
        self.check_lock: Callable[[], object] = lambda: None
        self.part_states: Callable[[], State] = dict


@dataclass(frozen=True)
class RunObjects:
    """Objects that the loop, the parts and the filters of a run share."""

    request: Request
    context: RunContext
    listener: ListenerGroup
    method: Method
    pooling: Pooling
    server: Server
    progress: Progress
    code: MethodCode
    plan: list[Round]
    participation: Participation
    private: ClientPrivacy | None
    guarantee: Guarantee | None
    store: RunStore
    ledger: Ledger
    timing: Timing = field(default_factory=Timing)

    @property
    def config(self) -> RunConfig:
        return self.context.config

    @property
    def notices(self) -> Notices:
        return self.context.notices

    @property
    def networks(self) -> Networks:
        return self.context.networks

    @property
    def samples(self) -> Samples:
        return self.context.samples

    @property
    def out(self) -> Path:
        return self.request.out

    @property
    def rounds(self) -> int:
        return sum(not entry.one_off for entry in self.plan)

    @property
    def sets(self) -> dict[str, Reader]:
        return self.samples.test_sets

    @cached_property
    def network(self) -> nn.Module:
        return self.networks.build()

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @cached_property
    def hooks(self) -> dict[str, Hooks]:
        targets = {"method": self.method, "pooling": self.pooling}
        return {name: Hooks(name, handler, self.server, self.context, self.code) for name, handler in targets.items()}

    @property
    def handlers(self) -> dict[str, Handler]:
        figures = {own_figures.NAME: own_figures.OwnFigures(self.method)} if self.config.own_networks else {}
        return {"method": self.method, "pooling": self.pooling, **figures}

    @property
    def hides_dropouts(self) -> bool:
        """True if dropped clients are hidden, because no noise covers a drop."""
        return self.private is not None and not self.notices.disclosure.clients

    @property
    def samples_in_secret(self) -> bool:
        """True if epsilon uses amplification by secret sampling."""
        return self.private is not None and self.private.amplified

    @cached_property
    def states(self) -> ClientStates:
        """Client states, which hold the run's executor, at first this process's."""
        serial = Serial(self.context, self.handlers, self.store.checkpoints.reader, self.config.client_threads)
        return ClientStates(serial, self.store.checkpoints, self.context, self.progress, self.samples_in_secret)

    @cached_property
    def log(self) -> RoundLog:
        hint = ""  # for the author of a method that does not override Method.expects
        if type(self.method).expects is Method.expects:
            hint = f" ({self.config.method} declares no uploads of its own; Method.expects is where a method does.)"
        hidden = self.hides_dropouts
        return RoundLog(self.context, self.progress, self.states, self.listener, hides_dropouts=hidden, hint=hint)

    @property
    def executor(self) -> Executor:
        """Executor of the clients, this process's until the run has chosen one."""
        return self.states.executor

    @property
    def here(self) -> Serial:
        executor: Serial = self.executor.here
        return executor


def open_store(run: RunObjects, check_lock: Callable[[], object]) -> None:
    """Open the folder of a new run, or restore server and progress from its last checkpoint."""
    store, context, resume = run.store, run.context, run.request.resume
    store.check_lock = check_lock
    run.timing.begin()
    entry = store.checkpoints.open(fresh=not resume, begun=resume and store.metrics.path.exists())
    facts = facts_of(context, data_fingerprint(context.data), store.out)
    if entry is None:
        compare_teachers(context, facts["data"])
    else:
        entry = change_rounds(entry, run.request.rounds)
        check_data_and_plan(entry, facts, run.plan, store.out)
        facts["code"] = read_code(entry["info"])  # of the run's start
        run.server.state = store.checkpoints.server_state()
        messages = store.checkpoints.messages_in_flight()
        run.participation.restore(store.checkpoints.participation_state(), messages, entry["round"])
        run.progress.done, run.progress.planned = entry["round"], entry["plan"]
    store.entry, store.facts = entry, facts
    DataFacts.of(context.data, private=not context.notices.disclosure.clients).write(store.out)
