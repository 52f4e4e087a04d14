"""Inspection of data sets of items: one pass over a sample of items, before a run begins."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch.utils.data import TensorDataset, default_collate

from fedkern.data.sources.items import ALONE, Items, cannot_keep, draw_rows, tensor_bytes
from fedkern.data.sources.row_store import RowStore
from fedkern.data.types import FederatedData
from fedkern.streams import GENERATORS, stream
from fedkern.usercode.code_identity import digest, identity_table, list_uncompared

HASHED, HASHED_IN_ALL = 64, 2000
"""Most items read for the fingerprint per data set, and in all (but at least two per set)."""


@dataclass(frozen=True)
class Sight:
    """Facts of a data set, from a sample of its items.

    Attributes:
        digest: hash of size, groups and items whose choice depends on the size alone.
        is_steady: whether an item is the same when read again from the same seeds.
        piles_threads: whether every item leaves a thread running.
        left_out: paths in an item that no comparison covers.
        hashes: by row.
    """

    owner: str
    digest: bytes
    is_steady: bool
    piles_threads: bool
    left_out: tuple[str, ...]
    hashes: Mapping[int, bytes] = field(default_factory=dict, repr=False)


def inspect(data: FederatedData, keep_items: str = "off", limit: int = 0) -> FederatedData:
    """Return federated items with the sights and row stores of their data sets.

    ``limit``: most bytes of all rows, unless ``keep_items`` is ``memory``.
    """
    judged = [*data.clients, data.validation, *data.tests.values()]
    samples = items_per_set(len({id(split.dataset) for split in judged if len(split)}))
    sets: dict[int, Items] = {}
    for split in data.splits:
        store = _store(split, keep_items, limit)
        sets.setdefault(id(split.dataset), replace(split, rows=None, draws=set(), store=store))
    seen = {id(split.dataset) for split in replace(data, client_tests=()).splits}
    unseen = {id(split.dataset) for split in data.client_tests} - seen
    sights = {key: inspect_items(split, samples) for key, split in sets.items() if key not in unseen and len(split)}
    size = sum(len(split) * split.store.item_bytes for split in sets.values() if split.store is not None)
    is_kept = size <= limit or keep_items == "memory"

    def equip(split: Items) -> Items:
        of_set = sets[id(split.dataset)]
        store = of_set.store if is_kept else None
        return replace(split, draws=of_set.draws, store=store, item_bytes=of_set.item_bytes, unkept=of_set.unkept)

    return replace(data.with_splits(equip), sights=sights)


def inspect_items(dataset: Items, samples: int = HASHED) -> Sight:
    """Read some items of a data set, and one again with all generators seeded.

    If its values differ, items depend on a generator that they do not move, and all generators are seeded from then on.
    """
    rows = draw_rows(stream(0, "items"), len(dataset), samples).tolist()
    value = hashlib.blake2b(f"{len(dataset)};".encode(), digest_size=16)
    value.update(b"" if dataset.groups is None else dataset.groups.numpy().tobytes())
    tables: list[dict[str, str]] = []
    threads: list[int] = []
    hashes: dict[int, bytes] = {}
    for row in rows:
        item = next(dataset.read([row], 0))
        threads.append(threading.active_count())
        tables = [*tables[:1], _table(item)]
        hashes[row] = digest(tables[-1]).encode()
        value.update(hashes[row])
        dataset.item_bytes = dataset.item_bytes or tensor_bytes(item)
        dataset.watch_items([row], [item])
    seeded = replace(dataset, draws={ALONE, *GENERATORS})
    is_steady = dataset.is_deterministic or _table(next(seeded.read(rows[:1], 0))) == tables[0]
    if not is_steady and dataset.draws < seeded.draws:
        dataset.draws.update(seeded.draws)
        return inspect_items(dataset, samples)
    piles_threads = len({*threads[:3]}) == 3 and threads[:3] == sorted(threads[:3])
    return Sight(dataset.name, value.digest(), is_steady, piles_threads, tuple(list_uncompared(tables[0])), hashes)


def items_per_set(sets: int) -> int:
    return max(2, min(HASHED, HASHED_IN_ALL // max(1, sets)))


def _table(item: object) -> dict[str, str]:
    """Return an item's identity: full values, but only names of classes and functions."""
    return identity_table({"item": item}, limit=sys.maxsize, code=False)


def _store(split: Items, keep_items: str, limit: int) -> RowStore | None:
    """Return a row store, or None if items cannot become rows or are in memory already."""
    if keep_items == "off" or type(split.dataset) is TensorDataset:
        return None
    if split.collate is not default_collate:
        if keep_items == "memory":
            raise cannot_keep(split.name, "its collate_fn may make other batches of the same items")
        return None
    return RowStore(len(split.dataset), None if keep_items == "memory" else limit)
