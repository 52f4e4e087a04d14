"""Asynchronous rounds (``--asynchronous``): the server steps when enough uploads have come, while clients work on.

A round is a step of the server. As many clients are at work as a synchronous round draws. When one is done, another
begins with the server's present network; a client whose upload waits for the step rests. The virtual clock
(`fedkern.engine.participation`) decides when a client is done, so that bits are the same on any machine.

FedBuff (arXiv 2106.06639) steps by the mean of the changes of ``buffer`` clients, each times (1 + s)^-``staleness``
after s steps of the server since the client began. FedAsync (arXiv 1903.03934) moves towards every upload by
the fraction ``mixing`` times (1 + s)^-``staleness``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor

from fedkern.engine.participation import DAMAGED, Assignment, InFlight, Participation, Traffic, is_time
from fedkern.engine.transport import torchrun_group
from fedkern.engine.uploads.filters import ExchangeRequest, Filter, register_filter
from fedkern.errors import UserError
from fedkern.messages.states import State
from fedkern.methods.base import VECTORS, ClientId, Federation, Message, Round, Upload
from fedkern.settings.config import RunConfig
from fedkern.streams import stream


class Flight(NamedTuple):
    """Row of a client at work in a checkpoint: round of its beginning, time of its end, number of its message."""

    began: int
    done: float
    number: int


class Asynchronous(Participation):
    """Participation policy of a run with ``--asynchronous``."""

    def __init__(self, config: RunConfig, federation: Federation) -> None:
        super().__init__(config, federation)
        self.name, self.options = config.policy
        self._buffer: int = self.options.get("buffer", 1)
        self._at_work: dict[ClientId, tuple[int, float]] = {}  # the rounds they began in, and when they are done
        self._sent: dict[ClientId, Message] = {}
        self._numbers: dict[ClientId, int] = {}  # of their messages within the round that sent them
        self._to_compare: list[Message] = []  # from a checkpoint, not yet compared with what the server sends
        self._started: list[ClientId] = []  # in this round
        self._begun = 0  # in the whole run
        self._staleness = 0.0

    def assign(self, entry: Round, round: int, traffic: Traffic | None = None) -> Assignment:
        self._started = []
        if entry.one_off:
            return super().assign(entry, round)
        came: dict[ClientId, int] = {}
        while len(came) < self._buffer:
            self._start(round, came, traffic)
            k = min(self._at_work, key=lambda k: (self._at_work[k][1], k))
            came[k], self.clock = self._at_work.pop(k)
        self._staleness = sum(round - began for began in came.values()) / len(came)
        return Assignment(sorted(came), began={k: began for k, began in came.items() if began < round})

    def _start(self, round: int, resting: Collection[ClientId], traffic: Traffic | None) -> None:
        config = self._config
        idle = [k for k in range(config.trained_clients) if k not in self._at_work and k not in resting]
        while idle and len(self._at_work) < config.sampled_clients:
            draw = stream(config.seed, "asynchronous", round=self._begun)
            k = idle.pop(int(draw.integers(len(idle))))
            self._at_work[k] = round, self.clock + self._duration(round, k, traffic)
            self._started.append(k)
            self._begun += 1

    def messages(
        self, clients: Sequence[ClientId], send: Callable[[Iterable[ClientId]], dict[ClientId, Message]]
    ) -> dict[ClientId, Message]:
        if not self._started:  # a one-off round; in all others somebody begins
            return send(clients)
        fresh = send(self._started)
        self._compare(next(iter(fresh.values())))
        self._sent.update(fresh)
        answered = {k: self._sent.pop(k) for k in clients}
        # Messages answered later are copied: the method may change the server's tensors in place.
        later = copy.deepcopy({k: self._sent[k] for k in self._started if k in self._sent})
        self._sent.update(later)
        places: dict[int, int] = {}  # clients that began together may share a message
        self._numbers.update({k: places.setdefault(id(message), len(places)) for k, message in later.items()})
        return answered

    def _compare(self, fresh: Message) -> None:
        """Compare messages from a checkpoint with one that the server sends now."""
        for message, name in product(self._to_compare, VECTORS):
            value, expected = message.get(name), fresh.get(name)
            if _form(value) != _form(expected):
                raise UserError(DAMAGED)
        self._to_compare = []

    def fewest_uploads(self, plan: Iterable[Round]) -> int:
        return self._buffer

    def figures(self) -> dict[str, float]:
        return {self.clock_name: self.clock, "staleness": self._staleness}

    def state(self) -> State:
        at_work = {k: [*self._at_work[k], self._numbers[k]] for k in self._sent}
        return {"clock": self.clock, "begun": self._begun, "at_work": at_work, "messages": sorted(self.in_flight())}

    def in_flight(self) -> InFlight:
        messages: InFlight = {}
        for k, message in self._sent.items():
            messages.setdefault(self._at_work[k][0], {})[self._numbers[k]] = message
        return messages

    def restore(self, state: State, messages: InFlight, rounds: int) -> None:
        super().restore(state, messages, rounds)
        self._begun, flights = state["begun"], {k: Flight(*row) for k, row in state["at_work"].items()}
        self._at_work = {k: (flight.began, flight.done) for k, flight in flights.items()}
        self._numbers = {k: flight.number for k, flight in flights.items()}
        self._sent = {k: messages[flight.began][flight.number] for k, flight in flights.items()}
        self._to_compare = [*self._sent.values()]

    def _can_restore(self, state: State, messages: InFlight, rounds: int) -> bool:
        def fits(k: object, row: object) -> bool:
            if type(k) is not int or k not in range(self._config.trained_clients) or not isinstance(row, list):
                return False
            if [type(value) for value in row] != [int, float, int]:
                return False
            flight = Flight(*row)
            if not 0 <= flight.began < rounds or not is_time(flight.done) or flight.done < state["clock"]:
                return False
            return isinstance(messages.get(flight.began, {}).get(flight.number), dict)

        if not super()._can_restore(state, messages, rounds):
            return False
        begun, at_work = state["begun"], state["at_work"]
        return (
            isinstance(at_work, dict)
            and len(at_work) <= self._config.sampled_clients
            and (type(begun), begun) == (int, rounds * self._buffer + len(at_work))
            and all(fits(k, row) for k, row in at_work.items())
            and state["messages"] == sorted({Flight(*row).began for row in at_work.values()})
        )


def _form(vector: object) -> object:
    return (vector.shape, vector.dtype) if isinstance(vector, Tensor) else type(vector)


@register_filter("asynchronous")
class StaleUploads(Filter):
    """Filter that rebases a stale upload onto the current network, and scales it by its staleness.

    Batch norm's running statistics are means: FedBuff's server averages the uploaded ones, FedAsync's mixes them like
    parameters. Changes are never added to statistics, as variances could become negative.
    """

    def __init__(self, policy: Asynchronous) -> None:
        self._power, self._mixing = policy.options["staleness"], policy.options.get("mixing")

    @classmethod
    def build(cls, run: Any) -> StaleUploads | None:
        return cls(run.participation) if isinstance(run.participation, Asynchronous) else None

    def combine(
        self, asked: ExchangeRequest, uploads: Iterator[Upload], note: Callable[[ClientId, Mapping[str, float]], None]
    ) -> Iterator[Upload]:
        return uploads if asked.entry.one_off else map(partial(self._rebase, asked, note), uploads)

    def _rebase(
        self, asked: ExchangeRequest, note: Callable[[ClientId, Mapping[str, float]], None], upload: Upload
    ) -> Upload:
        k, message = upload.client_id, dict(upload.message)
        note(k, {"staleness": upload.staleness})
        current = asked.hooks.declare_upload(asked.phase, k, asked.sent[k])
        weight = (1 + upload.staleness) ** -self._power
        if self._mixing is not None:
            for name in message.keys() & {"parameters", "buffers"}:
                message[name] = _move_towards(current[name], current[name], message[name], weight * self._mixing)
        elif upload.staleness and "parameters" in message:
            start = asked.sent[k]["parameters"]
            message["parameters"] = _move_towards(current["parameters"], start, message["parameters"], weight)
        return replace(upload, message=message)


def _move_towards(current: Tensor, start: Tensor, end: Tensor, weight: float) -> Tensor:
    return (current.double() + weight * (end.double() - start.double())).to(end.dtype)


def check_local(config: RunConfig) -> None:
    if config.asynchronous is not None:
        raise UserError(
            "--asynchronous has clients work in an order that only a virtual clock gives, on one machine: leave it out "
            "over Flower and on ranks of torchrun."
        )


def check_plan(config: RunConfig, plan: Iterable[Round]) -> None:
    """Raise UserError if ``--asynchronous`` or ``--devices`` does not fit a method's rounds, or the run's processes."""
    if config.asynchronous is not None and torchrun_group.find_rank() is not None:
        check_local(config)
    rounds = [entry for entry in plan if not entry.one_off]
    for name in config.given_flags("asynchronous", "devices"):
        if config.buffers == "pool" or any(
            entry.participants != "sampled" or len(entry.exchanges) > 1 or entry.cohort for entry in rounds
        ):
            raise UserError(
                f"{name} is for rounds of one exchange with clients that are drawn, and {config.method} with these "
                "options has others: leave it out."
            )
