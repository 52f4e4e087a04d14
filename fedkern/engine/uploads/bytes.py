"""Bytes of messages and uploads."""

from __future__ import annotations

from fedkern.engine.rounds.ledger import Ledger
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.uploads.filters import Arrival, ExchangeRequest, Filter, register_filter
from fedkern.methods.base import ClientId, Message


@register_filter("bytes")
class Bytes(Filter):
    """Filter that books messages and uploads of counted rounds.

    Args:
        hidden: whether missing uploads are secret, and booked with the bytes of an upload.
    """

    needs_whole_upload = False

    def __init__(self, ledger: Ledger, hidden: bool) -> None:
        self._ledger, self._hidden = ledger, hidden

    @classmethod
    def build(cls, run: RunObjects) -> Bytes:
        return cls(run.ledger, hidden=run.hides_dropouts)

    def on_sent(self, asked: ExchangeRequest, client: ClientId, message: Message) -> None:
        self._book(asked, client, "down", message)

    def on_missing(self, arrival: Arrival, failed: bool) -> None:
        if self._hidden:
            self._book(arrival.asked, arrival.client, "up", dict(arrival.declared))

    def decode(self, arrival: Arrival) -> str:
        self._book(arrival.asked, arrival.client, "up", arrival.message)
        return ""

    def _book(self, asked: ExchangeRequest, client: ClientId, direction: str, message: object) -> None:
        if asked.entry.counts(asked.phase.exchange):
            self._ledger.book(client, direction, message, phase=None if asked.entry.one_off else asked.phase)
