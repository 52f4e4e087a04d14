"""Identity of a run's data for comparing runs, independent of seed and partition.

Of data sets of items, one pass over a sample of items before a run tells what is known of them.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from fedkern.data.sources.arrays import NAME as ARRAYS
from fedkern.data.sources.items import ALONE, Items, RowStore, cannot_keep, draw_rows, tensor_bytes
from fedkern.data.split import Split
from fedkern.data.types import FederatedData, Pool, Source
from fedkern.files.image_rows import in_parts
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
    count = len({id(split.dataset) for split in judged if len(split)})
    samples = max(2, min(HASHED, HASHED_IN_ALL // max(1, count)))
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


SAMPLED_IMAGES, SAMPLED_BYTES = 2000, 32 << 20
"""Most images, and most bytes of images, that represent a training pool of which a run reads only a part."""
COMPARED_BYTES = 1 << 28
"""Most bytes of tensors whose items are all hashed."""

Sets = Mapping[str, Sequence[Split]]


def identify_memory(data: FederatedData) -> dict[str, str]:
    """Return the identity of data in memory, independent of how clients share them (see `identity`)."""
    sets: dict[str, list[Any]] = {"train": list(data.clients), "validation": [data.validation]}
    sets |= {f"test {name}".strip(): [split] for name, split in data.tests.items()}
    if isinstance(data.validation, Items):
        return _identify_items(data, sets)
    public = [] if data.public is None else [data.public]
    sets |= {"train": [*data.clients, *public], "client tests": list(data.client_tests)}
    return identity(data.classes, sets, sets)


def _identify_items(data: FederatedData, sets: Mapping[str, list[Any]]) -> dict[str, str]:
    datasets = {
        name: {id(part.dataset): replace(part, rows=None) for part in parts if len(part)}.values()
        for name, parts in sets.items()
    }
    sizes = {name: sum(map(len, parts)) for name, parts in datasets.items()}
    sights = data.sights or inspect(data).sights
    return {
        "classes": _digest(repr(name).encode() for name in data.classes),
        "sizes": ", ".join(f"{name} {size}" for name, size in sizes.items() if size),
        "samples": _digest(sorted(sights[id(part.dataset)].digest for parts in datasets.values() for part in parts)),
    }


def identify_source(source: Source, contents: Sets, pixels: list[bytes]) -> dict[str, str]:
    """Return the identity of a source: names and labels of whole pools, images of ``contents``."""
    tests = {f"test {name}".strip(): [pool] for name, pool in source.tests.items()}
    pools = {"train": [source.train], "validation": [source.validation], **tests}
    return identity((*source.classes, *source.sites), pools, contents, pixels)


def pixel_hashes(splits: Sequence[Split]) -> list[bytes]:
    """Return a hash of every image, without its label."""
    return [_hash(*image).digest() for split in splits for image in _rows(split.images)]


def sample_hashes(split: Split | Items, sights: Mapping[int, Sight]) -> list[bytes]:
    """Return a hash of every image, or of items in tensors or already read by the inspection."""
    if isinstance(split, Split):
        return pixel_hashes([split])
    rows = slice(None) if split.rows is None else split.rows
    if type(split.dataset) is TensorDataset and len(split) * split.item_bytes <= COMPARED_BYTES:
        with suppress(TypeError, RuntimeError):  # dtypes without a NumPy equivalent
            columns = [_rows(tensor[rows]) for tensor in split.dataset.tensors]
            return [_hash(*chain(*parts)).digest() for parts in zip(*columns, strict=True)]
    hashes = sights[id(split.dataset)].hashes if id(split.dataset) in sights else {}
    return [hashes[row] for row in np.arange(len(split.dataset))[rows].tolist() if row in hashes]


def sample_pool(pool: Pool) -> Split:
    """Read rows of a pool that no seed changes, or all rows of a small pool."""
    image = pool.take(torch.arange(min(1, len(pool)))).images
    count = min(len(pool), SAMPLED_IMAGES, max(1, SAMPLED_BYTES // max(1, image.numel())))
    order = stream(0, "identity").permutation(len(pool))[:count]
    return pool.take(torch.from_numpy(np.sort(order).astype(np.int64)))


def identity(
    classes: Sequence[str],
    sets: Mapping[str, Sequence[Split | Pool]],
    contents: Sets,
    pixels: list[bytes] | None = None,
) -> dict[str, str]:
    """Return hashes of a data set's parts, in hexadecimal, independent of sample order.

    Args:
        classes: of classes and sites.
        contents: samples whose images are read.
        pixels: receives a hash of every image of ``contents``, without its label.

    Returns:
        ``classes``, ``sizes``, ``names``, ``labels`` (with texts and patients, by name) and ``images`` (with labels).
    """
    names, images = [], []
    labels: dict[str, list[bytes]] = {name: [] for name in (*sets, *contents)}
    for name, parts in contents.items():
        for part in parts:
            for hasher, image in zip(_hash_labels(name, part), _rows(part.images), strict=True):
                labels[name].append(hasher.digest())
                for piece in image:
                    hasher.update(piece)
                images.append(hasher.digest())
                if pixels is not None:
                    pixels.append(_hash(*image).digest())
    for name, pools in sets.items():
        names += [_hash(_text(f"{name}\0{row}")).digest() for part in pools for row in part.ids or ()]
        if not _covers_pools(contents.get(name, ()), pools):  # else their labels have been read with the images
            labels[name] = [hasher.digest() for part in pools for hasher in _hash_labels(name, part)]
    sizes = {name: sum(map(len, parts)) for name, parts in sets.items()}
    return {
        "classes": _digest(repr(name).encode() for name in classes),
        "sizes": ", ".join(f"{name} {count}" for name, count in sizes.items() if count),
        "names": _digest(sorted(names)),
        "labels": _digest(sorted(digest for name in sets for digest in labels[name])),
        "images": _digest(sorted(images)),
    }


def _covers_pools(read: Sequence[Split], pools: Sequence[Split | Pool]) -> bool:
    """Return whether ``read`` covers all samples of the pools, with labels of the same form."""
    forms = {(part.labels.shape[1:], part.labels.dtype) for part in (*read, *pools) if len(part)}
    return sum(map(len, read)) == sum(map(len, pools)) and len(forms) < 2


def _hash_labels(set_name: str, part: Split | Pool) -> Iterator[hashlib.blake2b]:
    """Yield an updatable hash of every sample's set, name, text, patient and label."""
    patients = None if part.patients is None else part.patients.tolist()
    for row, label in enumerate(_rows(part.labels)):
        fields = [None if column is None else column[row] for column in (part.ids, part.texts, patients)]
        yield _hash(_text(f"{set_name}\0{fields!r}"), *label)


def _rows(tensor: Tensor) -> Iterator[tuple[bytes, memoryview]]:
    for part in in_parts(tensor):
        shape = repr(tuple(part.shape[1:])).encode()
        content = memoryview(np.ascontiguousarray(part.numpy()).reshape(-1).view(np.uint8).data)
        size = len(content) // max(1, len(part))
        for row in range(len(part)):
            yield shape, content[row * size : (row + 1) * size]


def _text(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _hash(*pieces: bytes | memoryview) -> hashlib.blake2b:
    hasher = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        hasher.update(piece)
    return hasher


def _digest(rows: Iterable[bytes]) -> str:
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(len(row).to_bytes(8, "little") + row)
    return hasher.hexdigest()


def list_user_code(data: FederatedData) -> dict[str, object]:
    """Return the user's objects beside the data: loss and metrics or a task, and collation."""
    collate = getattr(data.clients[0], "collate", default_collate)
    return {**data.task.code(), **({} if collate is default_collate else {"collate_fn": collate})}


def data_fingerprint(data: FederatedData) -> int:
    """Return a CRC-32 of all splits, which a resumed run must match.

    Mean and standard deviation count too where a program gives the images.
    """
    sights = (data.sights or inspect(data).sights) if isinstance(data.validation, Items) else {}
    value = zlib.crc32(b"".join(sight.digest for sight in sights.values()))
    if data.form.offers and (data.sights or data.name == ARRAYS):
        value = zlib.crc32(repr((data.form.mean, data.form.std)).encode(), value)
    for split in data.splits:
        value = split.fingerprint(value)
    return value
