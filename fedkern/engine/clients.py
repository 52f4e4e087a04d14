"""All clients of a run at once: as the experimenter looks at them, and whether their data are still the same."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from fedkern.engine.context import RunContext
from fedkern.engine.parties import Client
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.methods.base import Method


class Everybody(Mapping[int, Client]):
    """All clients as their states are on disk; each is read when it is first asked for."""

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
    """Loads every client's ``--teachers`` once, one after another, and keeps none of them.

    Asked before anything is written: found in the middle of a run, a wrong folder would leave a run folder that only
    goes on with the wrong folder.

    Raises:
        UserError: one is missing, damaged, not finite or of another architecture.
    """
    networks: dict[tuple[Any, ...], Any] = {}
    for k in range(context.federation.clients if context.teachers is not None else 0):
        client, own = Client(context, k, {}), method.architecture(k)
        key = tuple(sorted(own.items()))
        if key not in networks:  # loading overwrites everything, so one of a kind does for all
            networks[key] = client.network(**own)
        client.load_pretrained(networks[key])


def compare_teachers(context: RunContext, fingerprint: int) -> None:
    """Warns where ``--teachers`` is a run on other data than those of this ``fingerprint``."""
    other = None if context.teachers is None else context.teachers.other_data(context.config.to_dict(), fingerprint)
    if other is not None:
        context.warn("teachers-of-other-data", other)


def data_fingerprint(data: Any) -> int:
    """CRC-32 over all images, labels and texts of a federation: a resumed run must see the same ones."""
    value = 0
    public = () if data.public is None else (data.public,)
    for split in (*data.clients, data.validation, *data.tests.values(), *public, *data.client_tests):
        for tensor in (split.images, split.labels, split.masks):
            if tensor is not None:
                value = zlib.crc32(tensor.contiguous().numpy().reshape(-1).view("uint8").data, value)
        if split.texts is not None:
            value = zlib.crc32("\0".join(split.texts).encode(), value)
    return value
