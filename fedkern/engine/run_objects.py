"""Objects of a run: what its parts and filters, and the executor of remote clients, are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fedkern.data.identity import data_fingerprint
from fedkern.engine.client_states import ClientStates
from fedkern.engine.clients import compare_teachers
from fedkern.engine.executors.base import Executor
from fedkern.engine.executors.serial import Serial
from fedkern.engine.ledger import Ledger
from fedkern.engine.preparing import Prepared
from fedkern.engine.reader import Reader
from fedkern.engine.round_log import RoundLog
from fedkern.engine.store.background_writer import BackgroundWriter
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.data_facts import DataFacts
from fedkern.engine.store.records import Metrics
from fedkern.engine.store.releases import Releases
from fedkern.engine.store.resuming import change_rounds, check_same, facts_of
from fedkern.engine.timing import Timing
from fedkern.listeners.listener_group import ListenerGroup
from fedkern.methods.base import Method
from fedkern.settings.run_format import read_code


@dataclass(frozen=True)
class RunObjects(Prepared):
    """Objects that the parts and filters of a run share.

    Attributes:
        out: the run folder.
        alone: raises where another process has taken over the folder.
        listener: told what happens.
        remote: whether clients keep their data and states to themselves, on other machines.
        entry: the checkpoint that the run goes on from; None: it begins.
        facts: what a resumed run is compared with; ``"data"`` is the fingerprint of the data that the server knows.
        kept: gives the states of all parts and filters, as a checkpoint keeps them.
        checkpoints, metrics: of the run.
        ledger: bytes by client.
        wire: bytes that left and reached this machine; an executor of remote clients adds to them.
        timing: the run's clock.
        releases: digests of what is released; None without a guarantee.
        log: what happens to the clients of a round.
        states: what becomes of the clients' states.
        network: a fresh network.
        sets: the test sets by metric prefix.
    """

    out: Path
    alone: Callable[[], object]
    listener: ListenerGroup
    remote: bool
    entry: dict[str, Any] | None
    facts: Mapping[str, Any]
    kept: Callable[[], dict[str, Any]]
    checkpoints: Checkpoints
    metrics: Metrics
    ledger: Ledger
    wire: dict[str, int]
    timing: Timing
    releases: Releases | None
    log: RoundLog
    states: ClientStates
    network: nn.Module
    sets: dict[str, Reader]

    @property
    def executor(self) -> Executor:
        """Has the clients at work: that of this process until the run has chosen one."""
        return self.states.executor

    @property
    def here(self) -> Serial:
        """The executor of this process."""
        executor: Serial = self.executor.here
        return executor

    @property
    def parameters(self) -> int:
        """Number of parameters of a network."""
        return sum(parameter.numel() for parameter in self.network.parameters())


def opened(
    prepared: Prepared,
    out: Path,
    listener: ListenerGroup,
    alone: Callable[[], object],
    kept: Callable[[], dict[str, Any]],
    *,
    resume: bool,
    remote: bool,
    rounds: int | None = None,
) -> RunObjects:
    """The objects of a run that begins, or goes on from its last checkpoint, whose state the server then has.

    Args:
        prepared: method, server and data.
        resume: whether there may be a checkpoint.
        rounds: communication rounds in all that an extended run is to have.
        out, listener, alone, kept, remote: see :class:`RunObjects`.

    Raises:
        UserError: checkpoints are damaged, or of a run with other data or another method.
    """
    config, context, progress = prepared.config, prepared.context, prepared.progress
    metrics, timing = Metrics(out), Timing()
    checkpoints = Checkpoints(out, BackgroundWriter(), config.trained_clients)
    entry = checkpoints.open(fresh=not resume, begun=resume and metrics.path.exists())
    facts = facts_of(context, data_fingerprint(context.data), out)
    if entry is None:
        compare_teachers(context, facts["data"])
    else:
        entry = change_rounds(entry, rounds)
        check_same(entry, facts, prepared.plan, out)
        facts["code"] = read_code(entry["info"])  # that the run began with
        prepared.server.state = checkpoints.server_state()
        prepared.participation.restore(
            checkpoints.participation_state(), checkpoints.messages_in_flight(), entry["round"]
        )
        progress.done, progress.planned = entry["round"], entry["plan"]
    DataFacts.of(context.data, private=not context.disclosure.clients).write(out)
    here = Serial(context, prepared.handlers, checkpoints.reader, config.client_threads)
    states = ClientStates(here, checkpoints, context, progress, prepared.amplified)
    return RunObjects(
        **vars(prepared), out=out, alone=alone, listener=listener, remote=remote, entry=entry, facts=facts, kept=kept,
        checkpoints=checkpoints, metrics=metrics, ledger=Ledger(config.trained_clients), wire={}, timing=timing,
        releases=None if prepared.said is None else Releases(checkpoints.folder),
        log=RoundLog(context, progress, states, listener, silent=prepared.silent, hint=_hint_for_expects(prepared)),
        states=states, network=context.build(), sets=context.test_sets,
    )  # fmt: skip


def _hint_for_expects(prepared: Prepared) -> str:
    """Hint for the author of a method that does not override ``Method.expects``; else empty."""
    if type(prepared.method).expects is not Method.expects:
        return ""
    return f" ({prepared.config.method} declares no uploads of its own; Method.expects is where a method does.)"
