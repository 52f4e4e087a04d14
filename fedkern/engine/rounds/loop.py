"""Round loop: plays a method's plan, and calls the run's parts around every round."""

import time
from collections.abc import Sequence
from functools import partial

from fedkern.engine.participation import Assignment
from fedkern.engine.parts.part import Part, Record, Stop, Summary
from fedkern.engine.rounds.exchange import Exchange
from fedkern.engine.rounds.ledger import message_bytes
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.uploads.filters import ExchangeRequest, Filter
from fedkern.methods.base import ClientId, Phase, Round
from fedkern.privacy.guarantee import About
from fedkern.process.interrupts import check


class Loop:
    def __init__(self, run: RunObjects, filters: Sequence[Filter], parts: Sequence[Part]) -> None:
        self._run, self._filters, self._parts = run, filters, parts
        self._early: dict[Phase, object] = {}  # result of `send`, if the round's assignment has asked for bytes

    def play(self) -> Stop | None:
        """Play the remaining rounds, and return why the run ends before its plan, or None."""
        for entry in self._run.plan[self._run.progress.planned :]:
            check()
            self._run.progress.begin(entry)
            traffic = partial(self._declared_bytes, entry)
            assigned = self._run.participation.assign(entry, self._run.progress.index, traffic)
            number, rounds = self._run.progress.shown_number, self._run.rounds
            due = not entry.one_off and (number % self._run.config.eval_every == 0 or number == rounds)
            record = Record(entry, number, rounds, list(assigned.clients), due)
            for part in self._parts:
                if (stop := part.before_round(record)) is not None:
                    return stop
            self._play_round(record, assigned)
            for part in self._parts:
                record.stop = part.round_end(record) or record.stop
            if record.stop is not None:
                return record.stop
        return None

    def finish(self, stop: Stop | None) -> Summary:
        network = self._run.hooks["method"].network()
        if network is None:
            raise ValueError("model: expected a module at the end of the plan, given None")
        summary = Summary(network, stop=stop)
        for part in self._parts:
            part.finish(summary)
        return summary

    def _play_round(self, record: Record, assigned: Assignment) -> None:
        run, progress, log = self._run, self._run.progress, self._run.log
        entry, clients, absent = record.entry, record.participants, assigned.absent
        record.seconds.update({"train": 0.0, "aggregate": 0.0, "evaluate": 0.0})
        present = tuple(k for k in clients if k not in absent)
        together = (entry.cohort or record.in_server_process) and not run.executor.remote
        executor = run.executor.here if together else run.executor
        exchanges = run.pooling.exchanges(entry, record.due)
        record.exchanges = tuple(name for name, _ in exchanges)
        log.begin()
        for number, (name, callee) in enumerate(exchanges, 1):
            progress.exchange, progress.last_exchange = name, number == len(exchanges)
            begun, hooks = time.perf_counter(), run.hooks[callee]
            phase = Phase(progress.index, entry.name, name)
            outgoing = self._early.pop(phase) if phase in self._early else hooks.send(phase)
            sent = run.participation.messages(present, partial(hooks.messages, outgoing))
            asked = ExchangeRequest(
                phase, entry, progress.planned, len(clients), present, hooks, sent, assigned.began, assigned.shares
            )
            exchange = Exchange(asked, self._filters, executor, log, run.context.federation.samples)
            exchange.lose(hooks.messages(outgoing, absent), absent)
            absent = {}
            hooks.server_update(phase, exchange.uploads())
            for k, reason in run.server.refused:
                log.exclude(k, {"exchange": name, "reason": reason})
            run.server.refused.clear()
            record.seconds["train"] += exchange.seconds
            if len(exchanges) > 1:
                record.seconds[f"train/{name}"] = exchange.seconds
            record.seconds["aggregate"] += time.perf_counter() - begun - exchange.seconds
            present = tuple(k for k in present if k not in log.excluded)
            if not present:
                log.none_left()
        run.hooks["method"].check_model()
        run.states.end_round()
        run.server.round_cache.clear()
        progress.planned += 1
        progress.done += not entry.one_off
        record.clients, record.reports = log.clients, log.reports
        record.put(run.participation.figures(), About.CLIENTS)
        if not entry.one_off:
            run.participation.note_reports(log.clients)

    def _declared_bytes(self, entry: Round, k: ClientId) -> tuple[int, int]:
        """Return the bytes of a client's message and of its upload, as declared and encoded, in a round to come."""
        progress, hooks = self._run.progress, self._run.hooks["method"]
        phase = Phase(progress.index, entry.name, entry.exchanges[0])
        if phase not in self._early:
            progress.exchange = phase.exchange
            self._early = {phase: hooks.send(phase)}
        sent = hooks.messages(self._early[phase], [k])
        if k not in sent:
            return 0, 0
        asked = ExchangeRequest(phase, entry, progress.planned, 1, (k,), hooks, sent)
        declared = asked.declaration_of(k)
        for filter_ in reversed(self._filters):
            declared = filter_.declare_encoded(asked, declared)
        return message_bytes(sent[k]), message_bytes(declared)
