"""Base class of the upload filters, and the objects that filters receive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from fedkern.engine.hooks import Hooks
from fedkern.engine.uploads.encoders import Encoder, Encoders
from fedkern.messages.states import State
from fedkern.methods.base import ClientId, Declaration, Message, Phase, Round, Upload
from fedkern.usercode.registry import Registry, register_class


@dataclass(frozen=True)
class ExchangeRequest:
    """One exchange: the requests to the clients of a round.

    Attributes:
        phase: the exchange.
        entry: the round in the method's plan.
        plan: index of ``entry`` in the plan.
        clients: number of clients that the server asks, of which only ``participants`` may answer.
        participants: clients among them that are expected to answer.
        hooks: calls of the method, or of the pooling of statistics.
        sent: the message of every participant that gets one.
        began: the round that sent a participant's message, if it was an earlier one.
        shares: shares of their local steps that participants do, if below 1 (``--devices`` with ``--deadline``).
    """

    phase: Phase
    entry: Round
    plan: int
    clients: int
    participants: tuple[ClientId, ...]
    hooks: Hooks
    sent: Mapping[ClientId, Message]
    began: Mapping[ClientId, int] = field(default_factory=dict)
    shares: Mapping[ClientId, float] = field(default_factory=dict)

    def staleness(self, client: ClientId) -> int:
        return self.phase.round - self.began.get(client, self.phase.round)

    def declaration_of(self, client: ClientId) -> Declaration:
        """Return the declaration of a client's upload.

        Its ``parameters`` is the tensor that the client started from: an update is the upload minus this tensor.
        """
        sent = self.sent.get(client, {})
        declared = self.hooks.declare_upload(self.phase, client, sent)
        if self.staleness(client) and "parameters" in declared and "parameters" in sent:
            return {**declared, "parameters": sent["parameters"]}  # the method declares its server's present parameters
        return declared


@dataclass
class Arrival:
    """Upload of a client at the server.

    Attributes:
        asked: the exchange.
        message: the upload, which a filter may replace. None: it is empty, as the method allows, or nothing came.
        checked: figures of a check at the client (:meth:`Encoder.encode`), or None.
        info: the client's entry in the round's record, to which filters add figures.
    """

    asked: ExchangeRequest
    client: ClientId
    message: Any = None
    checked: State | None = None
    info: State = field(default_factory=dict)

    @property
    def sent(self) -> Message:
        return self.asked.sent[self.client]

    @cached_property
    def declared(self) -> Declaration:
        return self.asked.declaration_of(self.client)


class Filter:
    """A filter of uploads on their way to the server.

    Every method lets all pass until overridden. Filters are called in the order of the run's list, and their encoders
    in the opposite order: the last filter of the list encodes first and decodes last.

    Attributes:
        name: as registered.
        needs_whole_upload: whether the filter reads the vectors of uploads. If no filter of a run does, vectors that
            the server only adds up may stay on the GPU.
        keeps_on_device: whether the filter leaves vectors there. Runs with a filter that reads vectors do without it.
        keeps_client_state: whether the filter's encoders keep state at clients (:class:`Departure`).
    """

    name: ClassVar[str] = ""
    needs_whole_upload: ClassVar[bool] = True
    keeps_on_device: ClassVar[bool] = False
    keeps_client_state: ClassVar[bool] = False

    @classmethod
    def build(cls, run: Any) -> Filter | None:
        """Return the filter, or None if the run does without it.

        Args:
            run: the run's objects, among them ``run.config`` (its settings) and ``run.server``.
        """
        return cls()

    def state(self) -> State:
        """Return the server half's state for a checkpoint: numbers, texts, lists and dicts of these."""
        return {}

    def restore(self, state: State) -> None:
        """Continue from a checkpoint, before the first round.

        Args:
            state: the result of :meth:`state` at the checkpoint. An empty state is not restored.
        """

    def on_sent(self, asked: ExchangeRequest, client: ClientId, message: Message) -> None:
        """Note that a message has left for a client, which may never answer."""

    def encoders(self, asked: ExchangeRequest) -> Mapping[ClientId, Encoder]:
        """Return the client's half for each client whose upload it changes.

        Args:
            asked: the exchange, with ``phase`` and ``sent`` (messages by client id).

        Returns:
            Objects with ``encode``, by client id. They travel to where the clients work.
        """
        return {}

    def declare_encoded(self, asked: ExchangeRequest, declared: Declaration) -> Declaration:
        """Return the declaration of an upload that the filter's encoder has changed.

        ``--devices`` takes the seconds of an upload from its declared bytes, before the client trains.

        Args:
            asked: the exchange.
            declared: declaration of the upload that the encoder gets.
        """
        return declared

    def on_missing(self, arrival: Arrival, failed: bool) -> None:
        """Note that no upload came from a client.

        Args:
            arrival: the exchange and the client, without a message.
            failed: whether the client failed or diverged. Otherwise it was not heard or not understood.
        """

    def decode(self, arrival: Arrival) -> str:
        """Check an upload at the server, or change it.

        Args:
            arrival: the upload ``message`` with the ``sent`` message, the ``declared`` form of the upload and ``info``,
                the client's entry in the round's record. The filter may replace ``arrival.message``.

        Returns:
            Why the upload is refused, as the end of a sentence about the upload, or an empty text.
        """
        return ""

    def combine(
        self, asked: ExchangeRequest, uploads: Iterator[Upload], note: Callable[[ClientId, Mapping[str, float]], None]
    ) -> Iterator[Upload]:
        """Yield all uploads of an exchange in client order, lazily, or others in their place.

        Args:
            asked: the exchange.
            uploads: results of the filters before this one.
            note: adds figures to a client's entry in the round's record, ``note(client, {"name": value})``.
        """
        return uploads


def encoders_of(filters: Sequence[Filter], asked: ExchangeRequest) -> dict[ClientId, Encoders]:
    encoders: dict[ClientId, list[tuple[str, Encoder]]] = {k: [] for k in asked.shares if k in asked.sent}
    for filter_ in reversed(filters):
        for k, encoder in (filter_.encoders(asked) or {}).items():
            encoders.setdefault(k, []).append((filter_.name if filter_.keeps_client_state else "", encoder))
    return {k: Encoders(tuple(pairs), asked.shares.get(k, 1.0)) for k, pairs in encoders.items()}


FILTERS: Registry[type[Filter]] = Registry("filter")
"""Classes of filters by name."""
FilterClass = TypeVar("FilterClass", bound=type[Filter])


def register_filter(name: str) -> Callable[[FilterClass], FilterClass]:
    """Register a class as a filter of uploads under ``name``, its key in checkpoints (see :meth:`Filter.build`).

    Raises:
        ValueError: another filter has the name.
        TypeError: the class is not derived from :class:`Filter`, or has no docstring.

    Example:
        >>> @register_filter("no_empty")
        ... class NoEmpty(Filter):
        ...     '''Refuses empty uploads.'''
        ...
        ...     def decode(self, arrival):
        ...         return "" if arrival.message else "is empty"
    """
    return register_class(FILTERS, name, Filter, Encoder)
