"""Digests of a private run's releases (`fedkern.engine.store.releases`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.store.releases import DIVERGED, Releases
from fedkern.engine.uploads.filters import Arrival, ExchangeRequest, Filter, register_filter
from fedkern.methods.base import ClientId, Upload


@register_filter("client_digests")
class ClientDigests(Filter):
    """Filter that notes every client's message, or its absence, before anything reads it, as clients release."""

    def __init__(self, releases: Releases) -> None:
        self._releases = releases

    @classmethod
    def build(cls, run: RunObjects) -> ClientDigests | None:
        return cls(run.store.releases) if run.store.releases is not None and run.private is None else None

    def on_missing(self, arrival: Arrival, failed: bool) -> None:
        if failed:
            self._note(arrival, DIVERGED)

    def decode(self, arrival: Arrival) -> str:
        self._note(arrival, arrival.message)
        return ""

    def _note(self, arrival: Arrival, message: object) -> None:
        self._releases.add(arrival.asked.plan, arrival.asked.phase.exchange, arrival.client, message)


@register_filter("server_digests")
class ServerDigests(Filter):
    """Filter that notes the results of the filters before, as the server releases."""

    def __init__(self, releases: Releases) -> None:
        self._releases = releases

    @classmethod
    def build(cls, run: RunObjects) -> ServerDigests | None:
        return cls(run.store.releases) if run.store.releases is not None and run.private is not None else None

    def combine(
        self, asked: ExchangeRequest, uploads: Iterator[Upload], note: Callable[[ClientId, Mapping[str, float]], None]
    ) -> Iterator[Upload]:
        for upload in uploads:
            self._releases.add(asked.plan, asked.phase.exchange, upload.client_id, upload.message)
            yield upload
