"""Views of all clients at once, which only a simulation has."""

from collections.abc import Iterator, Mapping
from typing import Any

from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.methods.base import Method


class AllClients(Mapping[int, Client]):
    """All clients of a run, with states read from disk on first access."""

    def __init__(self, context: RunContext, checkpoints: Checkpoints) -> None:
        self._context, self._checkpoints = context, checkpoints
        self._known: dict[int, Client] = {}

    def __len__(self) -> int:
        return self._context.federation.clients

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __getitem__(self, k: int) -> Client:
        if not 0 <= k < len(self):
            raise KeyError(k)
        if k not in self._known:
            self._known[k] = Client(self._context, k, self._checkpoints.client_state(k))
        return self._known[k]


def check_teachers(method: Method, context: RunContext) -> None:
    """Load every client's network of ``--teachers`` once, keeping none, before anything is written.

    A mistake found later would leave a run folder that can be resumed only with the same mistake.
    """
    networks: dict[tuple[Any, ...], Any] = {}
    for k in range(context.federation.clients if context.teachers is not None else 0):
        client, architecture = Client(context, k, {}), method.architecture(k)
        key = tuple(sorted(architecture.items()))
        if key not in networks:  # loading overwrites every tensor, so clients of one architecture share a network
            networks[key] = client.network(**architecture)
        client.load_pretrained(networks[key])


def compare_teachers(context: RunContext, fingerprint: int) -> None:
    """Warn if the run of ``--teachers`` had data with another ``fingerprint``."""
    warning = None if context.teachers is None else context.teachers.other_data(context.config.to_dict(), fingerprint)
    if warning is not None:
        context.notices.warn("teachers-of-other-data", warning)
