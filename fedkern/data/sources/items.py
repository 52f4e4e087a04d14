"""Items: splits of map-style PyTorch data sets, whose samples are read when a batch needs them."""

from __future__ import annotations

import hashlib
import sys
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset, default_collate

from fedkern.errors import RAISED, UserError, described, told
from fedkern.messages.leaves import leaves, parted
from fedkern.process.torch_modes import kept
from fedkern.streams import mix_words, preserve_generators, seed_generators, stream
from fedkern.tasks import Task
from fedkern.usercode.identity import digest, identity_table, left_out

HASHED, HASHED_IN_ALL = 64, 2000
"""Most items of a set, and of all sets together but for two of each, that are read for the fingerprint."""
PERMUTED = 1 << 24
"""Most rows that are put in an order where only some are drawn."""
_LOCK = threading.RLock()  # items draw from the process's generators, and sets are evaluated in threads


@dataclass(eq=False)
class Items:
    """A split of a map-style data set: of it only ``len`` and ``[index]`` are used.

    Attributes:
        dataset: the data set.
        who: the split in messages: ``client a``, ``the test set``.
        task: what is learnt of it.
        collate: makes a batch of a list of items.
        rows: int64 ``[n]``, the items of the split; None: all.
        classes: int64, the class of every item of the data set, or None where they were not read.
    """

    homes: ClassVar[None] = None  # nothing is known of sites, patients and names
    patients: ClassVar[None] = None
    ids: ClassVar[None] = None

    dataset: Any
    who: str
    task: Task
    collate: Callable[[list[Any]], Any]
    rows: Tensor | None = None
    classes: Tensor | None = None

    @cached_property
    def still(self) -> bool:
        """Whether no item can draw random numbers, so that it is the same whenever it is read."""
        return _still(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    @property
    def memory(self) -> int:
        """Bytes that prepared samples of the split would keep: none, as every batch is read anew."""
        return 0

    def subset(self, indices: Tensor) -> Items:
        """A new split with the rows ``indices``, int64 ``[m]``."""
        return replace(self, rows=indices if self.rows is None else self.rows[indices])

    def raw(self) -> dict[str, Tensor]:
        """As many tensors like those of the first item, which take no memory: what a client would send."""
        tensors = [leaf for leaf in leaves(next(self.read([0], 0))) if isinstance(leaf, Tensor)]
        return {str(place): leaf.detach().expand(len(self), *leaf.shape) for place, leaf in enumerate(tensors)}

    def plus(self, others: Sequence[Items]) -> Items:
        """A split with the items of others behind its own."""
        parts = [self, *others]
        sets = [each.dataset if each.rows is None else Subset(each.dataset, each.rows.tolist()) for each in parts]
        return Items(ConcatDataset(sets), self.who, self.task, self.collate)

    @cached_property
    def labels(self) -> Tensor:
        """The targets of all samples, where a method needs them: every item is read for it."""
        batches = (self.batch(rows, 0) for rows in np.array_split(np.arange(len(self)), -(-len(self) // 256)))
        targets: Tensor = self.task.read_targets(torch.cat([torch.as_tensor(parted(batch)[1]) for batch in batches]))
        return targets

    @property
    def image_labels(self) -> Tensor:
        """The class of every sample, int64 ``[n]``, where classes are known."""
        assert self.classes is not None
        return self.classes if self.rows is None else self.classes[self.rows]

    def any_known(self) -> bool:
        """Whether a target is known: nobody can tell without reading all."""
        return True

    def units(self) -> None:
        """The samples that belong together: nothing is known."""

    def identities(self) -> list[str]:
        """What tells a sample from others, in this process: its data set below subsets and concatenations, and row."""
        return [_origin(self.dataset, row) for row in self._places(range(len(self)))]

    def _places(self, indices: Sequence[int] | np.ndarray) -> list[int]:
        """The rows of the data set."""
        index = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        places: list[int] = (index if self.rows is None else self.rows[index]).tolist()
        return places

    def read(self, indices: Sequence[int] | np.ndarray, word: int) -> Iterator[Any]:
        """Yield the items at ``indices``; what one draws begins at a seed made of ``word`` and its row.

        Modes that an item leaves are put back before the next one.

        Raises:
            UserError: an item cannot be read.
        """
        with _LOCK, preserve_generators(), nullcontext(_nothing) if self.still else kept() as restore:
            for row in self._places(indices):
                if not self.still:
                    seed_generators(mix_words(word, row))
                try:
                    item = self.dataset[row]
                except RAISED as error:  # the user's own code may raise anything
                    raise UserError(f"Item {row} of {self.who} cannot be read ({cause(error)}).") from error
                restore()
                yield item

    def batch(self, indices: Sequence[int] | np.ndarray, word: int) -> Any:
        """Return what ``collate`` makes of the items at ``indices``.

        What a user's collation draws begins at a seed made of ``word`` and all rows of the batch.

        Raises:
            UserError: an item cannot be read, or the items make no batch.
        """
        if type(self.dataset) is TensorDataset and self.collate is default_collate:  # the same, sooner
            rows = torch.tensor(self._places(indices), dtype=torch.int64)
            return [tensor[rows] for tensor in self.dataset.tensors]
        items, places = list(self.read(indices, word)), self._places(indices)
        try:
            if self.collate is default_collate:  # draws nothing
                return default_collate(items)
            digest = hashlib.blake2b(np.asarray(places, dtype=np.int64).tobytes(), digest_size=8).digest()
            with _LOCK, preserve_generators(), kept():
                seed_generators(mix_words(mix_words(word, -1), int.from_bytes(digest, "little")))
                return self.collate(items)
        except RAISED as error:
            first = f"{', '.join(map(str, places[:3]))}{', ...' * (len(places) > 3)}"
            raise UserError(
                f"Items {first} of {self.who} make no batch ({cause(error)}): give items of one shape, or a collate_fn."
            ) from error

    def fingerprint(self, value: int = 0, sets: int = 1) -> int:
        """A CRC-32 that goes on from ``value``, over some of the items: of one of ``sets`` splits."""
        return zlib.crc32(self.digest(per_set(sets)), value)

    def digest(self, most: int = HASHED) -> bytes:
        """A hash of the number of items and of up to ``most`` of them, chosen by their number alone."""
        count = len(self)
        chosen = draw_rows(stream(0, "items"), count, most)
        value = hashlib.blake2b(f"{count};".encode(), digest_size=16)
        for item in self.read(chosen, 0):
            value.update(digest(_table(item)).encode())
        return value.digest()


def unsteady(splits: Sequence[Items]) -> list[str]:
    """The splits whose first item is another one when it is read again from the same seeds, in words."""

    def first(split: Items) -> dict[str, str]:
        return _table(next(split.read([0], 0)))

    return [split.who for split in splits if len(split) and not split.still and first(split) != first(split)]


def leaves_threads(split: Items) -> bool:
    """Return whether every item that is read leaves another thread running."""
    counts = []
    for _ in range(0 if split.still or not len(split) else 3):
        next(split.read([0], 0))
        counts.append(threading.active_count())
    return len({*counts}) == 3 and counts == sorted(counts)


def _table(item: Any) -> dict[str, str]:
    """Return the identity of an item: its values in full, of classes and functions the name alone."""
    return identity_table({"item": item}, limit=sys.maxsize, code=False)


def not_compared(split: Items) -> list[str]:
    """Return the parts of the first item of a split at which no comparison looks."""
    return left_out(_table(next(split.read([0], 0)))) if len(split) else []


def draw_rows(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Return up to ``size`` of ``count`` rows, drawn at random and sorted, int64."""
    if count > PERMUTED:
        return np.sort(rng.choice(count, min(size, count), replace=False, shuffle=False)).astype(np.int64)
    return np.sort(rng.permutation(count)[:size]).astype(np.int64)


def per_set(sets: int) -> int:
    """How many items of each of so many sets are read for fingerprints."""
    return max(2, min(HASHED, HASHED_IN_ALL // max(1, sets)))


def _nothing() -> None:
    """Restore nothing."""


def cause(error: BaseException) -> str:
    """An exception in one line, without the full stop of a sentence of fedkern's."""
    return (told(error) or described(error)).rstrip(".")


def _still(dataset: Any) -> bool:
    """Whether a data set is torch's own, of tensors in memory."""
    if type(dataset) is Subset:
        return _still(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(_still, dataset.datasets))
    return type(dataset) is TensorDataset


def _origin(dataset: Any, row: int) -> str:
    if isinstance(dataset, Subset):
        return _origin(dataset.dataset, int(dataset.indices[row]))
    if isinstance(dataset, ConcatDataset):
        part = bisect_right(dataset.cumulative_sizes, row)
        return _origin(dataset.datasets[part], row - (dataset.cumulative_sizes[part - 1] if part else 0))
    return f"{id(dataset)}/{row}"
