"""The round loop: plays a method's plan, exchange by exchange, and asks the run's parts around every round."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial

from fedkern.engine.client_states import ClientStates
from fedkern.engine.context import RunContext
from fedkern.engine.exchange import Exchange
from fedkern.engine.executors.base import Executor
from fedkern.engine.hooks import Hooks
from fedkern.engine.participation import Assignment, Participation
from fedkern.engine.parts.base import Part, Record, Stop, Summary
from fedkern.engine.progress import Progress
from fedkern.engine.round_log import RoundLog
from fedkern.engine.server import Server
from fedkern.engine.uploads.filters import Asked, Filter
from fedkern.methods.base import Phase, Round
from fedkern.methods.common.pooling import Pooling
from fedkern.privacy.disclosure import About
from fedkern.process.interrupts import check


class Loop:
    """The rounds of one run.

    Args:
        plan: the rounds of the method, one-off ones included.
        hooks: what is asked of the method and of the pooling, by name.
        pooling: adds exchanges to rounds after which the network is evaluated.
        context, server, progress: of the run.
        participation: says who takes part in a round.
        executor: has the clients at work.
        states: what becomes of the clients' states.
        log: what happens to the clients of a round.
        filters: what uploads pass, in order.
        parts: what is done around rounds, in order.
    """

    def __init__(
        self,
        plan: Sequence[Round],
        hooks: Mapping[str, Hooks],
        pooling: Pooling,
        context: RunContext,
        server: Server,
        progress: Progress,
        participation: Participation,
        executor: Executor,
        states: ClientStates,
        log: RoundLog,
        filters: Sequence[Filter],
        parts: Sequence[Part],
    ) -> None:
        self._plan, self._hooks, self._pooling, self._context, self._server = plan, hooks, pooling, context, server
        self._progress, self._participation, self._executor = progress, participation, executor
        self._states, self._log, self._filters, self._parts = states, log, filters, parts
        self._rounds = sum(not entry.one_off for entry in plan)

    def play(self) -> Stop | None:
        """Plays the rounds that are left; returns why it ended before the plan did, or None."""
        for entry in self._plan[self._progress.planned :]:
            check()
            self._progress.begin(entry)
            assigned = self._participation.assign(entry, self._progress.index)
            record = self._record(entry, assigned)
            for part in self._parts:
                if (stop := part.before_round(record)) is not None:
                    return stop
            self._round(record, assigned)
            for part in self._parts:
                record.stop = part.round_end(record) or record.stop
            if record.stop is not None:
                return record.stop
        return None

    def finish(self, stop: Stop | None) -> Summary:
        """Has the parts finish."""
        network = self._hooks["method"].network()
        if network is None:
            raise ValueError("model: expected a module at the end of the plan, given None")
        summary = Summary(network, stop=stop)
        for part in self._parts:
            part.finish(summary)
        return summary

    def _record(self, entry: Round, assigned: Assignment) -> Record:
        """The record of a round that is about to begin."""
        number, every = self._progress.shown, self._context.config.eval_every
        due = not entry.one_off and (number % every == 0 or number == self._rounds)
        return Record(entry, number, self._rounds, list(assigned.clients), due)

    def _round(self, record: Record, assigned: Assignment) -> None:
        """Plays a round."""
        entry, clients, absent = record.entry, record.participants, assigned.absent
        record.seconds.update({"train": 0.0, "aggregate": 0.0, "evaluate": 0.0})
        present = [k for k in clients if k not in absent]
        exchanges = self._pooling.exchanges(entry, record.due)
        record.exchanges = tuple(name for name, _ in exchanges)
        self._log.begin()
        for number, (name, asker) in enumerate(exchanges, 1):
            self._progress.exchange, self._progress.last_exchange = name, number == len(exchanges)
            begun, hooks = time.perf_counter(), self._hooks[asker]
            phase = Phase(self._progress.index, entry.name, name)
            outgoing = hooks.send(phase)
            sent = self._participation.messages(present, partial(hooks.messages, outgoing))
            asked = Asked(
                phase, entry, self._progress.planned, len(clients), tuple(present), hooks, sent, assigned.began
            )
            exchange = Exchange(
                asked, self._filters, self._at_work(record), self._log, self._context.federation.samples
            )
            exchange.lose(hooks.messages(outgoing, absent), absent)
            absent = {}
            hooks.server_update(phase, exchange.uploads())
            for k, reason in self._server.refused:
                self._log.leave_out(k, {"exchange": name, "reason": reason})
            self._server.refused.clear()
            record.seconds["train"] += exchange.seconds
            if len(exchanges) > 1:
                record.seconds[f"train/{name}"] = exchange.seconds
            record.seconds["aggregate"] += time.perf_counter() - begun - exchange.seconds
            present = [k for k in present if k not in self._log.left]
            if not present:
                self._log.none_left()
        self._hooks["method"].check_model()
        self._states.end_round()
        self._server.round_cache.clear()
        self._progress.planned += 1
        self._progress.done += not entry.one_off
        record.clients, record.reports = self._log.clients, self._log.reports
        record.put(self._participation.figures(), About.CLIENTS)

    def _at_work(self, record: Record) -> Executor:
        """The executor of a round: this process's, where a cohort works together or a trace is made."""
        together = (record.entry.cohort or record.together) and not self._executor.remote
        return self._executor.here if together else self._executor
