"""The round loop: plays a method's plan, exchange by exchange, and asks the run's parts around every round."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from fedkern.engine.client_states import ClientStates
from fedkern.engine.context import RunContext
from fedkern.engine.exchange import Exchange
from fedkern.engine.executors.base import Executor
from fedkern.engine.hooks import Hooks
from fedkern.engine.participants import Draw, absent_clients
from fedkern.engine.parts.base import Part, Record, Stop, Summary
from fedkern.engine.progress import Progress
from fedkern.engine.round_log import RoundLog
from fedkern.engine.server import Server
from fedkern.engine.uploads.filters import Asked, Filter
from fedkern.interrupts import check
from fedkern.methods.base import Phase, Round
from fedkern.methods.common.pooling import Pooling


class Loop:
    """The rounds of one run.

    Args:
        plan: the rounds of the method, one-off ones included.
        hooks: what is asked of the method and of the pooling, by name.
        pooling: adds exchanges to rounds after which the network is evaluated.
        context, server, progress: of the run.
        draw: the clients of a round that draws some.
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
        draw: Draw,
        executor: Executor,
        states: ClientStates,
        log: RoundLog,
        filters: Sequence[Filter],
        parts: Sequence[Part],
    ) -> None:
        self._plan, self._hooks, self._pooling, self._context, self._server = plan, hooks, pooling, context, server
        self._progress, self._draw, self._executor, self._states = progress, draw, executor, states
        self._log, self._filters, self._parts = log, filters, parts
        self._rounds = sum(not entry.one_off for entry in plan)

    def play(self) -> Stop | None:
        """Plays the rounds that are left; returns why it ended before the plan did, or None."""
        for entry in self._plan[self._progress.planned :]:
            check()
            self._progress.begin(entry)
            record = self._record(entry)
            for part in self._parts:
                if (stop := part.before_round(record)) is not None:
                    return stop
            self._round(record)
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

    def _record(self, entry: Round) -> Record:
        """The record of a round that is about to begin."""
        number, every = self._progress.shown, self._context.config.eval_every
        if isinstance(entry.participants, tuple):
            participants = list(entry.participants)
        elif entry.participants == "all":
            participants = list(range(self._context.federation.clients))
        else:
            participants = self._draw(self._progress.index)
        due = not entry.one_off and (number % every == 0 or number == self._rounds)
        return Record(entry, number, self._rounds, participants, due)

    def _round(self, record: Record) -> None:
        """Plays a round."""
        entry, clients = record.entry, record.participants
        absent = {} if entry.one_off else absent_clients(self._context.config, self._progress.index, clients)
        record.seconds.update({"train": 0.0, "aggregate": 0.0, "evaluate": 0.0})
        present = [k for k in clients if k not in absent]
        exchanges = self._pooling.exchanges(entry, record.due)
        record.exchanges = tuple(name for name, _ in exchanges)
        self._log.begin()
        for name, asker in exchanges:
            self._progress.exchange, self._progress.last_exchange = name, name == exchanges[-1][0]
            begun, hooks = time.perf_counter(), self._hooks[asker]
            phase = Phase(self._progress.index, entry.name, name)
            outgoing = hooks.send(phase)
            sent = hooks.messages(outgoing, present)
            asked = Asked(phase, entry, self._progress.planned, len(clients), tuple(present), hooks, sent)
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

    def _at_work(self, record: Record) -> Executor:
        """The executor of a round: this process's, where a cohort works together or a trace is made."""
        together = (record.entry.cohort or record.together) and not self._executor.apart
        return self._executor.here if together else self._executor
