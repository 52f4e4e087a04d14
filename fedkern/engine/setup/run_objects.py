"""Objects of a run: what its loop, parts and filters read, and the folder that it writes."""

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
from fedkern.engine.store.resuming import change_rounds, check_same, facts_of
from fedkern.listeners.listener_group import ListenerGroup
from fedkern.messages.states import State
from fedkern.methods.base import Method, Round
from fedkern.methods.common.pooling import Pooling
from fedkern.privacy import Guarantee
from fedkern.settings.config import RunConfig
from fedkern.settings.run_format import read_code

Remote = Callable[["RunObjects"], Executor]
"""Makes the executor of clients that keep their data and states to themselves (see :attr:`Executor.remote`)."""


@dataclass(frozen=True)
class Request:
    """What a run is asked for beside its settings.

    See :func:`fedkern.engine.run.run` for all attributes.
    """

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
        """Return whether the clients' samples are in this process."""
        return self.data is None or self.remote is None


class RunStore:
    """The folder of a run.

    Args:
        out: the folder.
        private: whether the run has a guarantee, so that releases leave digests.

    Attributes:
        out: the folder.
        checkpoints, metrics: of the run.
        releases: digests of what is released; None without a guarantee.
        entry: the checkpoint that the run goes on from; None: the run begins.
        facts: what a resumed run is compared with; ``"data"`` is the fingerprint of the data that the server knows.
        check_lock: raises where another process has taken over the folder.
        part_states: gives the states of all parts and filters, as a checkpoint keeps them.
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
    """Objects that the loop, the parts and the filters of a run share.

    Attributes:
        request: what the run was asked for.
        context: data, networks and notices.
        listener: told what happens.
        method, pooling: the method, and the pooling of statistics.
        server: the server, as the method's ``start`` has left it.
        progress: where the run stands.
        code: names the method in an exception.
        plan: the rounds, one-off ones included.
        participation: says who takes part in a round.
        private: privacy of whole clients; None without it.
        guarantee: which of the run's releases its epsilon covers; None where it promises none.
        store: the run folder.
        ledger: bytes by client.
        timing: the run's clock.
    """

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
        """The settings."""
        return self.context.config

    @property
    def notices(self) -> Notices:
        """Warnings, and what may be told."""
        return self.context.notices

    @property
    def networks(self) -> Networks:
        """Networks of this process."""
        return self.context.networks

    @property
    def samples(self) -> Samples:
        """The data in batches."""
        return self.context.samples

    @property
    def out(self) -> Path:
        """Make the run folder, or return the given one."""
        return self.request.out

    @property
    def rounds(self) -> int:
        """Communication rounds of the plan."""
        return sum(not entry.one_off for entry in self.plan)

    @property
    def sets(self) -> dict[str, Reader]:
        """The test sets by metric prefix."""
        return self.samples.test_sets

    @cached_property
    def network(self) -> nn.Module:
        """A fresh network."""
        return self.networks.build()

    @property
    def parameters(self) -> int:
        """Number of parameters of a network."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @cached_property
    def hooks(self) -> dict[str, Hooks]:
        """Return what is asked of method and pooling in an exchange, by the names of the handlers."""
        targets = {"method": self.method, "pooling": self.pooling}
        return {name: Hooks(name, handler, self.server, self.context, self.code) for name, handler in targets.items()}

    @property
    def handlers(self) -> dict[str, Handler]:
        """Objects whose ``client_update`` may be called, by name."""
        figures = {own_figures.NAME: own_figures.OwnFigures(self.method)} if self.config.own_networks else {}
        return {"method": self.method, "pooling": self.pooling, **figures}

    @property
    def hides_dropouts(self) -> bool:
        """Return whether to hide dropped clients, because no noise covers that an upload was no good."""
        return self.private is not None and not self.notices.disclosure.clients

    @property
    def samples_in_secret(self) -> bool:
        """Return whether epsilon counts that nobody knows who takes part in a round."""
        return self.private is not None and self.private.amplified

    @cached_property
    def states(self) -> ClientStates:
        """Return what becomes of the clients' states.

        Has the run's executor, that of this process at first.
        """
        serial = Serial(self.context, self.handlers, self.store.checkpoints.reader, self.config.client_threads)
        return ClientStates(serial, self.store.checkpoints, self.context, self.progress, self.samples_in_secret)

    @cached_property
    def log(self) -> RoundLog:
        """Return what happens to the clients of a round."""
        hint = ""  # for the author of a method that does not override Method.expects
        if type(self.method).expects is Method.expects:
            hint = f" ({self.config.method} declares no uploads of its own; Method.expects is where a method does.)"
        silent = self.hides_dropouts
        return RoundLog(self.context, self.progress, self.states, self.listener, silent=silent, hint=hint)

    @property
    def executor(self) -> Executor:
        """Has the clients at work: that of this process until the run has chosen one."""
        return self.states.executor

    @property
    def here(self) -> Serial:
        """The executor of this process."""
        executor: Serial = self.executor.here
        return executor


def open_store(run: RunObjects, check_lock: Callable[[], object]) -> None:
    """Open the folder of a run that begins, or go on from its last checkpoint, whose state the server then has.

    Raises:
        UserError: checkpoints are damaged, or of a run with other data or another method.
    """
    store, context, resume = run.store, run.context, run.request.resume
    store.check_lock = check_lock
    run.timing.begin()
    entry = store.checkpoints.open(fresh=not resume, begun=resume and store.metrics.path.exists())
    facts = facts_of(context, data_fingerprint(context.data), store.out)
    if entry is None:
        compare_teachers(context, facts["data"])
    else:
        entry = change_rounds(entry, run.request.rounds)
        check_same(entry, facts, run.plan, store.out)
        facts["code"] = read_code(entry["info"])  # that the run began with
        run.server.state = store.checkpoints.server_state()
        messages = store.checkpoints.messages_in_flight()
        run.participation.restore(store.checkpoints.participation_state(), messages, entry["round"])
        run.progress.done, run.progress.planned = entry["round"], entry["plan"]
    store.entry, store.facts = entry, facts
    DataFacts.of(context.data, private=not context.notices.disclosure.clients).write(store.out)
