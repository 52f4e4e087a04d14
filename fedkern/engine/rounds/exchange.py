"""One exchange of a round: messages out, and uploads in through the run's filters."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from fedkern.engine.context import TAKEN, convert_figures
from fedkern.engine.executors.executor import Answer, Executor
from fedkern.engine.rounds.round_log import RoundLog
from fedkern.engine.uploads.filters import Arrival, ExchangeRequest, Filter, encoders_of
from fedkern.errors import locate_errors
from fedkern.methods.base import ClientId, Message, Upload
from fedkern.process.interrupts import check


class Exchange:
    """One exchange: sends the messages and yields the checked uploads."""

    def __init__(
        self,
        asked: ExchangeRequest,
        filters: Sequence[Filter],
        executor: Executor,
        log: RoundLog,
        samples: Sequence[int],
    ) -> None:
        self._request, self._filters, self._executor, self._log = asked, filters, executor, log
        self._samples = samples
        self.seconds = 0.0

    def lose(self, messages: Mapping[ClientId, Message], absent: Mapping[ClientId, str]) -> None:
        for k, why in absent.items():
            if k in messages:
                self._tell_sent(k, messages[k])
            self._log.note_dropped(k, {"exchange": self._request.phase.exchange, "reason": why})

    def uploads(self) -> Iterator[Upload]:
        """Yield the uploads in client order, lazily: the server is done with an upload before it gets the next one.

        Uploads of clients that began in earlier rounds come first. Refused uploads, and empty ones that the method
        allows, are not yielded.
        """
        uploads = self._each()
        for filter_ in self._filters:
            uploads = filter_.combine(self._request, uploads, self._log.note)
        return uploads

    def _each(self) -> Iterator[Upload]:
        answers, left_out = self._answers(), 0
        while True:
            check()
            start = time.perf_counter()
            if (answer := next(answers, None)) is None:
                break
            upload = self._take_answer(answer)
            self.seconds += time.perf_counter() - start
            del answer
            if upload is None:
                left_out += 1
                continue
            # Without a reference here, only the server may still hold this upload while the next client trains.
            handover = [upload] if upload.message is not None else []
            del upload
            if handover:
                yield handover.pop()
        if left_out == len(self._request.participants):
            self._log.none_left()

    def _take_answer(self, answer: Answer) -> Upload | None:
        """Return an answer's upload, or None if its client is left out."""
        k = answer.client
        self._tell_sent(k, self._request.sent[k])
        self._log.pass_warnings(answer)
        if self._request.hooks.own:
            self._log.marks |= answer.marks
        info: dict[str, Any] = {"samples": self._samples[k], **answer.report}
        arrival = Arrival(self._request, k, answer.message, answer.checked, info)
        if answer.absent or answer.refused or answer.problem is not None:
            for filter_ in self._filters:
                filter_.on_missing(arrival, failed=not answer.absent and answer.problem is not None)
            self._log.note_missing(answer)
            return None
        for filter_ in self._filters:
            if why := filter_.decode(arrival):
                self._log.note_refused(k, why)
                return None
        self._log.note_done(k, info, answer.seconds)
        return Upload(k, self._samples[k], arrival.message, staleness=self._request.staleness(k))

    def _tell_sent(self, k: ClientId, message: Message) -> None:
        for filter_ in self._filters:
            filter_.on_sent(self._request, k, message)

    def _answers(self) -> Iterator[Answer]:
        asked, coded = self._request, encoders_of(self._filters, self._request)
        if asked.entry.cohort and not self._executor.remote and asked.sent:
            start, serial = time.perf_counter(), self._executor.here
            clients = {k: serial.client(k) for k in asked.participants}
            for client in clients.values():
                client.report, client.marks = {}, set()
            uploads = asked.hooks.cohort_update(clients, asked.phase, asked.sent)
            for client in clients.values():
                with locate_errors(f"Client {client.label} failed", None):
                    client.check_state()
            if uploads is not None:
                share = (time.perf_counter() - start) / len(asked.sent)
                reports = {
                    k: convert_figures(own.report, f"client {k}: client.report", TAKEN) for k, own in clients.items()
                }
                marks = frozenset().union(*(client.collect_marks() for client in clients.values()))
                return (Answer(k, uploads.pop(k), report=reports[k], seconds=share, marks=marks) for k in [*asked.sent])
        begun: dict[int, dict[ClientId, Message]] = {}
        for k, message in asked.sent.items():
            begun.setdefault(asked.phase.round - asked.staleness(k), {})[k] = message
        # Clients that began together work side by side, in the round in which they began.
        return chain.from_iterable(
            self._executor.answers(asked.hooks.callee, replace(asked.phase, round=round), sent, coded)
            for round, sent in sorted(begun.items())
        )
