"""Identity of a run's data, by which runs are compared: depends neither on the seed nor on the partition."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedkern.data.image_rows import in_parts
from fedkern.data.types import FederatedData, Pool, Source, Split
from fedkern.streams import stream

SAMPLED_IMAGES, SAMPLED_BYTES = 2000, 32 << 20
"""Most images, and most of their bytes, that stand for a training pool of which a run reads only some."""

Sets = Mapping[str, Sequence[Split]]


def of_memory(data: FederatedData) -> dict[str, str]:
    """Identity of data in memory: of all samples, whichever client holds them (see `identity`)."""
    train = [*data.clients, *(() if data.public is None else (data.public,))]
    tests = {f"test {name}".strip(): [split] for name, split in data.tests.items()}
    sets: Sets = {"train": train, "validation": [data.validation], **tests, "client tests": data.client_tests}
    return identity(data.classes, sets, sets)


def of_source(source: Source, contents: Sets) -> dict[str, str]:
    """Identity of a data set: names and labels of whole pools, and the contents of the images in ``contents``."""
    tests = {f"test {name}".strip(): [pool] for name, pool in source.tests.items()}
    pools = {"train": [source.train], "validation": [source.validation], **tests}
    return identity((*source.classes, *source.sites), pools, contents)


def sampled(pool: Pool) -> Split:
    """Rows of a pool that no seed changes; all of them where the pool is small."""
    one = pool.take(torch.arange(min(1, len(pool)))).images
    count = min(len(pool), SAMPLED_IMAGES, max(1, SAMPLED_BYTES // max(1, one.numel())))
    order = stream(0, "identity").permutation(len(pool))[:count]
    return pool.take(torch.from_numpy(np.sort(order).astype(np.int64)))


def identity(classes: Sequence[str], sets: Mapping[str, Sequence[Split | Pool]], contents: Sets) -> dict[str, str]:
    """Hashes, in hexadecimal, of what data consist of; the order of samples does not count.

    Args:
        classes: names of classes and sites.
        sets: all samples, by the name of their set.
        contents: the samples whose images are read, by the name of their set.

    Returns:
        ``classes``, ``sizes`` (numbers of samples, as text), ``names``, ``labels`` (with texts and patients, by name)
        and ``images`` (with labels).
    """
    sizes = {name: sum(map(len, parts)) for name, parts in sets.items()}
    every = [(name, part) for name, parts in sets.items() for part in parts]
    return {
        "classes": _digest(repr(name).encode() for name in classes),
        "sizes": ", ".join(f"{name} {count}" for name, count in sizes.items() if count),
        "names": _digest(sorted(_row(f"{name}\0{row}") for name, part in every for row in part.ids or ())),
        "labels": _digest(
            sorted(_row(f"{name}\0{text}", label) for name, part in every for text, label in _told(part))
        ),
        "images": _digest(
            sorted(
                _row(f"{name}\0{text}", label, image)
                for name, parts in contents.items()
                for part in parts
                for (text, label), image in zip(_told(part), _rows(part.images), strict=True)
            )
        ),
    }


def _told(part: Split | Pool) -> Iterator[tuple[str, memoryview]]:
    """Name, text and patient of every sample, as one text, and its label."""
    patients = None if part.patients is None else part.patients.tolist()
    for row, label in enumerate(_rows(part.labels)):
        known = [None if each is None else each[row] for each in (part.ids, part.texts, patients)]
        yield repr(known), label


def _rows(tensor: Tensor) -> Iterator[memoryview]:
    for part in in_parts(tensor):
        shape = repr(tuple(part.shape[1:])).encode()
        flat = np.ascontiguousarray(part.numpy()).reshape(len(part), -1) if part.numel() else np.zeros((len(part), 0))
        for row in flat.view(np.uint8):
            yield memoryview(shape + row.tobytes())


def _row(text: str, *contents: memoryview) -> bytes:
    found = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16)
    for content in contents:
        found.update(content)
    return found.digest()


def _digest(rows: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(len(row).to_bytes(8, "little") + row)
    return found.hexdigest()
