"""All clients of a run at once: as the experimenter looks at them, and whether their data are still the same."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from fedkern.engine.bench import Bench
from fedkern.engine.checkpoint import Checkpoints
from fedkern.engine.serial import Client


class Everybody(Mapping[int, Client]):
    """All clients as their states are on disk; each is read when it is first asked for."""

    def __init__(self, bench: Bench, checkpoints: Checkpoints) -> None:
        self._bench, self._checkpoints = bench, checkpoints
        self._known: dict[int, Client] = {}

    def __len__(self) -> int:
        return self._bench.federation.clients

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __getitem__(self, k: int) -> Client:
        if not 0 <= k < len(self):
            raise KeyError(k)
        if k not in self._known:
            self._known[k] = Client(self._bench, k, self._checkpoints.client_state(k))
        return self._known[k]


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
