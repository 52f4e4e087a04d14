"""Base class of the filters that uploads pass, and what a filter is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from fedkern.engine.hooks import Hooks
from fedkern.engine.uploads.encoders import Encoder, Encoders
from fedkern.messages.states import State
from fedkern.methods.base import ClientId, Declaration, Message, Phase, Round, Upload
from fedkern.usercode.hook_checks import register_class
from fedkern.usercode.registry import Registry


@dataclass(frozen=True)
class ExchangeRequest:
    """One exchange: what the clients of a round are asked.

    Attributes:
        phase: the exchange.
        entry: the round in the method's plan.
        plan: number of the round in the plan.
        clients: number of clients that the server asks, whoever answers.
        participants: those of them that are expected to answer.
        hooks: the method, or the pooling of statistics, whose exchange it is.
        sent: the message of every participant that gets one.
        began: the round in which a participant was sent its message, where that was an earlier one.
    """

    phase: Phase
    entry: Round
    plan: int
    clients: int
    participants: tuple[ClientId, ...]
    hooks: Hooks
    sent: Mapping[ClientId, Message]
    began: Mapping[ClientId, int] = field(default_factory=dict)

    def staleness(self, client: ClientId) -> int:
        """Return the number of rounds since the client was sent its message."""
        return self.phase.round - self.began.get(client, self.phase.round)

    def declaration_of(self, client: ClientId) -> Declaration:
        """Return the declaration of a client's upload.

        Its ``parameters``, from which an update counts, are what was sent.
        """
        sent = self.sent.get(client, {})
        declared = self.hooks.declare_upload(self.phase, client, sent)
        if self.staleness(client) and "parameters" in declared and "parameters" in sent:
            return {**declared, "parameters": sent["parameters"]}  # the method declares what its server has now
        return declared


@dataclass
class Arrival:
    """What came from a client.

    Attributes:
        asked: the exchange.
        client: the client's id.
        message: the upload; a filter may replace it.  None: it is empty, as the method allows, or nothing came.
        checked: figures of its check where it was checked at the client (:meth:`Encoder.encode`), else None.
        info: the client's entry in the round's record, to which filters add figures.
    """

    asked: ExchangeRequest
    client: ClientId
    message: Any = None
    checked: State | None = None
    info: State = field(default_factory=dict)

    @property
    def sent(self) -> Message:
        """The message that the client was sent."""
        return self.asked.sent[self.client]

    @cached_property
    def declared(self) -> Declaration:
        """The declaration of the upload."""
        return self.asked.declaration_of(self.client)


class Filter:
    """A part of an upload's way to the server.

    Every method lets all pass until overridden.

    Filters are asked in the order of the run's list.  Their encoders change an upload in the opposite order: what the
    last filter of the list encodes first is decoded last.

    Attributes:
        name: as registered.
        needs_whole_upload: whether the filter reads the vectors of uploads.  Where none of a run's filters does,
            vectors that the server only adds up may stay on the GPU.
        keeps_on_device: whether the filter leaves vectors there.  Runs with a filter that reads them do without it.
        keeps_client_state: whether the filter's encoders keep state at clients (:class:`Departure`).
    """

    name: ClassVar[str] = ""
    needs_whole_upload: ClassVar[bool] = True
    keeps_on_device: ClassVar[bool] = False
    keeps_client_state: ClassVar[bool] = False

    @classmethod
    def build(cls, run: Any) -> Filter | None:
        """Return the filter of a run, made of the run's objects.

        None where the run does without it.
        """
        return cls()

    def state(self) -> State:
        """Return what a checkpoint keeps of the server's half, in plain values."""
        return {}

    def restore(self, state: State) -> None:
        """Goes on from what :meth:`state` returned at a checkpoint, before the first round that is played."""

    def on_sent(self, asked: ExchangeRequest, client: ClientId, message: Message) -> None:
        """Note that a message has left for a client, which may never answer."""

    def encoders(self, asked: ExchangeRequest) -> Mapping[ClientId, Encoder]:
        """Return the client's half, by client.

        No entry where an upload travels as it is.
        """
        return {}

    def on_missing(self, arrival: Arrival, failed: bool) -> None:
        """No upload came from a client: it ``failed`` or diverged, or was not heard or not understood."""

    def decode(self, arrival: Arrival) -> str:
        """Return the server's half: checks an upload, or changes it.

        Returns:
            Why the upload is refused, as the end of a sentence about it; empty where it is not.
        """
        return ""

    def combine(
        self, asked: ExchangeRequest, uploads: Iterator[Upload], note: Callable[[ClientId, Mapping[str, float]], None]
    ) -> Iterator[Upload]:
        """All uploads of an exchange in client order, lazily.

        Others in their place may be handed on.

        Args:
            asked: the exchange.
            uploads: what the filters before this one hand on.
            note: adds figures to a client's entry in the round's record.
        """
        return uploads


def encoders_of(filters: Sequence[Filter], asked: ExchangeRequest) -> dict[ClientId, Encoders]:
    """Return the encoders of every client whose upload does not travel as it is."""
    encoders: dict[ClientId, list[tuple[str, Encoder]]] = {}
    for part in reversed(filters):
        for k, encoder in (part.encoders(asked) or {}).items():
            encoders.setdefault(k, []).append((part.name if part.keeps_client_state else "", encoder))
    return {k: Encoders(tuple(pairs)) for k, pairs in encoders.items()}


FILTERS: Registry[type[Filter]] = Registry("filter")
"""Classes of filters by name."""
FilterClass = TypeVar("FilterClass", bound=type[Filter])


def register_filter(name: str) -> Callable[[FilterClass], FilterClass]:
    """Class decorator: registers a filter of uploads as ``name``, its key in checkpoints (see :meth:`Filter.build`).

    Raises:
        ValueError: another filter has the name.
        TypeError: the class is not derived from :class:`Filter`, or has no docstring.
    """
    return register_class(FILTERS, name, Filter, Encoder)
