"""Items: splits of map-style PyTorch data sets, read when a batch needs them.

Rows of items that are the same whenever they are read can stay in memory.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset, default_collate

from fedkern.data.sharing.groups import Rows, grouped_rows
from fedkern.errors import RAISED, UserError, describe_error, user_message
from fedkern.messages.leaves import leaves, map_leaves, split_targets
from fedkern.process.torch_modes import keep_modes
from fedkern.streams import (
    GENERATORS,
    forget_spare_number,
    generator_states,
    mix_words,
    preserve_generators,
    restore_generators,
    seed_generators,
)
from fedkern.tasks import Task

DRAWING = "its items draw random numbers"
"""Reason why random items cannot become rows."""
EQUAL = 256
"""Items read again and found equal before rows replace items: a flip of probability 0.1 passes with 1e-22."""


class RowStore:
    """Tensors with one row per item of a data set, filled as items are read.

    Rows replace items once all items of a split were read twice, no generator moved, and at least `EQUAL` items were
    bitwise equal.  Otherwise the store stays unused for good.  Unpickling gives an empty store.

    ``limit``: most bytes; None: unlimited, because the user asked for rows.  ``reason``: why rows cannot replace items.
    """

    def __init__(self, count: int, limit: int | None) -> None:
        self.count, self.limit, self._lock, self.reason = count, limit, threading.Lock(), ""
        self.reads, self.equal = np.zeros(count, dtype=np.uint8), 0
        self._columns: list[Tensor] = []
        self._kinds: set[tuple[type, ...]] = set()
        self._form, self._empty = "", ()

    def __reduce__(self) -> tuple[type, tuple[int, int | None]]:
        return RowStore, (self.count, self.limit)

    @property
    def item_bytes(self) -> int:
        """Bytes per item, 0 before any row."""
        return sum(column[:1].nbytes for column in self._columns)

    def has_rows(self, places: Sequence[int] | np.ndarray | slice, reads: int = 2) -> bool:
        """Return whether items were read often enough, with ``reads`` 1 if any value of a random item will do."""
        return bool(self._columns) and (reads < 2 or self.equal >= EQUAL) and bool((self.reads[places] >= reads).all())

    def take(self, rows: Tensor) -> object:
        """Return rows, int64 ``[B]``, as torch's collation would, or None if another thread dropped them."""
        columns = self._columns  # another thread may drop them
        if columns and type(self._empty) is list and all(type(part) is Tensor for part in self._empty):
            return [column.index_select(0, rows) for column in columns]
        remaining = iter(columns)
        return map_leaves(lambda _: next(remaining).index_select(0, rows), self._empty) if columns else None

    def watch(self, places: Sequence[int], items: Sequence[object], batch: object, draws: bool) -> str:
        """Keep new rows, compare known ones, and return the reason why items cannot become rows, if any."""
        with self._lock:
            if not self.reason:
                self.reason = DRAWING if draws else self._fill(places, items, batch)
                if self.reason:
                    self._columns = []
            return self.reason

    def _fill(self, places: Sequence[int], items: Sequence[object], batch: object) -> str:
        tensors, is_new = [*leaves(batch)], self.reads[places] == 0
        if not all(_is_plain(leaf, len(places)) for leaf in tensors):
            return "a batch of its items holds more than tensors with one row per item"
        kinds = {_kind(item) for item in compress(items, is_new)} | self._kinds
        form = str(map_leaves(lambda leaf: (leaf.dtype, leaf.shape[1:]), batch))
        if len(kinds) > 1 or form != (self._form or form):
            return "its items are of several types or shapes"
        if not self._form:
            if self.limit is not None and self.count * sum(leaf[:1].nbytes for leaf in tensors) > self.limit:
                return "its rows take more memory than a run keeps"
            self._columns = [leaf.new_empty((self.count, *leaf.shape[1:])) for leaf in tensors]
            self._kinds, self._form, self._empty = kinds, form, map_leaves(lambda leaf: leaf[:0].clone(), batch)
        rows, new = torch.tensor(places, dtype=torch.int64), torch.from_numpy(is_new)
        for column, leaf in zip(self._columns, tensors, strict=True):
            if is_new.any():
                column[rows[new]] = leaf[new]
            copy = column.index_select(0, rows)
            if copy.stride() != leaf.stride() or not torch.equal(_bits(copy), _bits(leaf)):
                return "an item was another one when it was read again"
        self.reads[places] = np.minimum(self.reads[places] + 1, 2)
        self.equal += int((~is_new).sum())
        return ""


def _kind(item: object) -> tuple[type, ...]:
    parts = item.values() if isinstance(item, dict) else item if isinstance(item, (tuple, list)) else ()
    return type(item), *map(type, parts)


def _is_plain(leaf: object, count: int) -> bool:
    if type(leaf) is not Tensor or leaf.layout != torch.strided or leaf.device.type != "cpu":
        return False
    if leaf.is_quantized or leaf.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch sets no rows of them
        return False
    return not leaf.requires_grad and leaf.shape[:1] == (count,)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


PERMUTED = 1 << 24
"""Most rows that are permuted where only some are drawn."""
ALONE = "alone"
"""Mark of data sets read item by item, because items are random, fail together or change modes."""
_LOCK = threading.RLock()  # items draw from the process's generators, and sets are evaluated in threads


class MapStyle(Protocol):
    """Data set of which only ``len`` and ``[index]`` are used."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...


@dataclass(eq=False)
class Items:
    """Split of a map-style data set.

    Attributes:
        name: the split in messages: ``client a``, ``the test set``.
        rows: int64 ``[n]``, items of the split; None: all.
        classes: int64, class of every item of the data set, or None if unread.
        store: rows that may replace items.
        item_bytes: 0 if unknown.
        draws: generators that items have moved, and perhaps `ALONE`; shared by all splits of the data set.
        unkept: reason why rows cannot replace items.
        groups: int64, hash of the patient of every item of the data set, or None.
        homes: as in `fedkern.data.Split`.
        group_key: item key that names the group and is removed from batches.
    """

    ids: ClassVar[None] = None  # items have no names or volumes
    cases: ClassVar[None] = None

    dataset: Any
    name: str
    task: Task
    collate: Callable[[list[Any]], Any]
    rows: Tensor | None = None
    classes: Tensor | None = None
    store: RowStore | None = None
    item_bytes: int = 0
    draws: set[str] = field(default_factory=set)
    unkept: str = ""
    groups: Tensor | None = None
    homes: Tensor | None = None
    group_key: str = ""
    is_kept: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        forget_spare_number()

    @cached_property
    def is_deterministic(self) -> bool:
        """Return whether items cannot be random, and are the same at every reading."""
        return _is_deterministic(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    @property
    def memory(self) -> int:
        """Bytes of rows that the split may keep."""
        return 0 if self.store is None else self.store.item_bytes * len(self)

    def subset(self, indices: Tensor) -> Items:
        rows = indices if self.rows is None else self.rows[indices]
        return replace(self, rows=rows, homes=None if self.homes is None else self.homes[indices])

    def raw(self) -> dict[str, Tensor]:
        """Return the samples as a client would send them: expanded tensors of the first item, which take no memory."""
        tensors = [leaf for leaf in leaves(next(self.read([0], 0))) if isinstance(leaf, Tensor)]
        return {str(place): leaf.detach().expand(len(self), *leaf.shape) for place, leaf in enumerate(tensors)}

    def plus(self, splits: Sequence[Items]) -> Items:
        parts = [self, *splits]
        sets = [part.dataset if part.rows is None else Subset(part.dataset, part.rows.tolist()) for part in parts]
        patients = [split.patients for split in parts if split.patients is not None]
        groups = torch.cat(patients) if len(patients) == len(parts) else None
        return Items(ConcatDataset(sets), self.name, self.task, self.collate, groups=groups, group_key=self.group_key)

    @property
    def patients(self) -> Tensor | None:
        """Patient of every sample, int64 ``[n]``, if known."""
        return self.groups if self.groups is None or self.rows is None else self.groups[self.rows]

    @cached_property
    def labels(self) -> Tensor:
        """Targets of all samples, for which every item is read."""
        batches = (self.batch(rows, 0) for rows in np.array_split(np.arange(len(self)), -(-len(self) // 256)))
        targets = torch.cat([torch.as_tensor(split_targets(batch)[1]) for batch in batches])
        return torch.as_tensor(self.task.read_targets(targets))

    @property
    def image_labels(self) -> Tensor:
        """Class of every sample, int64 ``[n]``."""
        assert self.classes is not None
        return self.classes if self.rows is None else self.classes[self.rows]

    def units(self) -> Rows | None:
        """Return the patient of every sample from 0, or None if no samples belong together."""
        return grouped_rows(None, None, self.patients)

    def identities(self) -> list[str]:
        """Identify every sample by its innermost data set and row."""
        origins = (locate(self.dataset, row) for row in self._rows_at(range(len(self))).tolist())
        return [f"{id(dataset)}/{row}" for dataset, row in origins]

    def infinite_item(self) -> int | None:
        """Return the first item of the data set, among the split's, that holds NaN or infinity, or None."""
        for row in self._rows_at(range(len(self))).unique().tolist():
            if any(not x.isfinite().all() for x in leaves(self.collate(self._read([row], 0))) if isinstance(x, Tensor)):
                return int(row)
        return None

    def _rows_at(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        index = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        return index if self.rows is None else self.rows.index_select(0, index)

    def fingerprint(self, value: int = 0) -> int:
        """Return a CRC-32 of the rows, continuing from ``value``."""
        return zlib.crc32(b"" if self.rows is None else self.rows.numpy().tobytes(), value)

    def read(self, indices: Sequence[int] | np.ndarray, word: int) -> Iterator[object]:
        """Yield items one at a time, see :meth:`batch`."""
        return (self._read([row], word)[0] for row in self._rows_at(indices).tolist())

    def _read(self, places: list[int], word: int) -> list[object]:
        """Return items without the key of their group."""
        items = self._read_items(places, word)
        return [_drop_key(item, self.group_key) for item in items] if self.group_key else items

    def _read_items(self, places: list[int], word: int) -> list[object]:
        """Return items, read at once until one is found to draw random numbers, then one by one.

        An item draws from a seed of ``word`` and its row; modes that it changes are restored before the next.
        """
        if self.is_deterministic:
            return [self._read_item(row) for row in places]
        if "NumPy" in self.draws:
            forget_spare_number()
        with _LOCK, keep_modes() as restore:
            states = generator_states()
            try:
                while True:
                    if not self.draws:
                        items = self._read_at_once(places)
                    else:
                        items, names = [], self.draws - {ALONE}
                        for row in places:
                            seed_generators(mix_words(word, row), names=names)
                            items.append(self._read_item(row))
                            restore()
                    found = restore_generators(states) | ({ALONE} if restore() or items is None else set())
                    if found <= self.draws and items is not None:
                        return items
                    self.draws.update(found, {ALONE})
            except BaseException:
                restore_generators(states)
                raise

    def _read_at_once(self, places: list[int]) -> list[object] | None:
        """Return items read at once, in any state of the generators, or None if that fails."""
        try:
            several = _has_getitems(self.dataset)
            items = [*self.dataset.__getitems__([*places])] if several else [self.dataset[row] for row in places]
        except RAISED:  # read one by one, the failing item can be named
            return None
        return items if len(items) == len(places) else None

    def _read_item(self, row: int) -> object:
        try:
            return self.dataset[row]
        except RAISED as error:  # the user's own code may raise anything
            raise UserError(f"Item {row} of {self.name} cannot be read ({name_cause(error)}).") from error

    def batch(self, indices: Sequence[int] | np.ndarray, word: int) -> object:
        """Return one batch, see :meth:`batches`."""
        return next(self.batches([indices], word))

    def batches(self, plan: Sequence[Sequence[int] | np.ndarray], word: int, reads: int = 2) -> Iterator[object]:
        """Yield the collated items of every batch, read or taken from rows.

        Items draw from seeds of ``word`` and their rows, the user's collation from ``word`` and the batch's rows.
        ``plan``: indices into the split, int64 ``[B]`` per batch.  ``reads``: 1 if any value of a random item will do.
        """
        for number, indices in enumerate(plan):
            if not number and reads > 1 and self._has_rows():  # still compare one item per pass
                first_rows = self._rows_at(indices[:1]).tolist()
                self.watch_items(first_rows, self._read(first_rows, word))
            batch = self._take(self._rows_at(indices), reads)
            if batch is None:
                places = self._rows_at(indices).tolist()
                items = self._read(places, word)
                batch = self._collate(places, items, word)
                self.watch_items(places, items, batch)
            yield batch

    def is_in_memory(self) -> bool:
        """Return whether batches are rows of tensors."""
        return self._is_plain() or self._has_rows()

    def _is_plain(self) -> bool:
        return type(self.dataset) is TensorDataset and self.collate is default_collate

    def _has_rows(self) -> bool:
        if self.store is not None and not self.is_kept:
            self.is_kept = self.store.has_rows(slice(None) if self.rows is None else self.rows.numpy())
        return self.store is not None and self.is_kept

    def _take(self, rows: Tensor, reads: int) -> object:
        """Return a batch of rows from memory, or None if items must be read."""
        if self._is_plain():  # the same result, faster
            return [tensor.index_select(0, rows) for tensor in self.dataset.tensors]
        if self.store is None or not (self._has_rows() or (reads == 1 and self.store.has_rows(rows.numpy(), 1))):
            return None
        return self.store.take(rows)

    def watch_items(self, places: list[int], items: list[object], batch: object = None) -> None:
        """Show items, and the batch that torch's collation makes of them, to the store."""
        if self.store is None:
            return
        try:
            batch = default_collate(items) if batch is None else batch
        except RAISED:
            reason = "its items are of several types or shapes"
        else:
            reason = self.store.watch(places, items, batch, bool(self.draws & {*GENERATORS}))
        self.unkept = self.unkept or reason
        if reason and self.store.limit is None:
            raise cannot_keep(self.name, reason)
        self.store = None if reason else self.store

    def _collate(self, places: list[int], items: list[object], word: int) -> object:
        try:
            if self.collate is default_collate:  # draws nothing
                return default_collate(items)
            digest = hashlib.blake2b(np.asarray(places, dtype=np.int64).tobytes(), digest_size=8).digest()
            with _LOCK, preserve_generators(), keep_modes():
                seed_generators(mix_words(mix_words(word, -1), int.from_bytes(digest, "little")))
                return self.collate(items)
        except RAISED as error:
            rows, reason = f"{', '.join(map(str, places[:3]))}{', ...' * (len(places) > 3)}", name_cause(error)
            raise UserError(
                f"Items {rows} of {self.name} make no batch ({reason}): give tensors of one shape, or collate_fn."
            ) from error


def tensor_bytes(item: object) -> int:
    return sum(leaf.nbytes for leaf in leaves(item) if isinstance(leaf, Tensor))


def cannot_keep(split: str, reason: str) -> UserError:
    """Return the error for items that the user wants in memory."""
    return UserError(f"--keep-items memory: {split} cannot be kept, as {reason}: take --keep-items auto or off.")


def draw_rows(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Return up to ``size`` of ``count`` rows, random and sorted, int64."""
    if count > PERMUTED:
        return np.sort(rng.choice(count, min(size, count), replace=False, shuffle=False)).astype(np.int64)
    return np.sort(rng.permutation(count)[:size]).astype(np.int64)


def name_cause(error: BaseException) -> str:
    """Describe an exception in one line without a full stop."""
    return (user_message(error) or describe_error(error)).rstrip(".")


def _is_deterministic(dataset: object) -> bool:
    """Return whether a data set is torch's own, of tensors in memory."""
    if type(dataset) is Subset:
        return _is_deterministic(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(_is_deterministic, dataset.datasets))
    return type(dataset) is TensorDataset


def _has_getitems(dataset: object) -> bool:
    """Return whether ``__getitems__`` is valid: no derived class overrides ``__getitem__`` alone."""
    if type(dataset) is Subset:
        return _has_getitems(dataset.dataset)
    kinds = (vars(kind).keys() & {"__getitems__", "__getitem__"} for kind in type(dataset).__mro__)
    return "__getitems__" in next(filter(None, kinds), ())


def locate(dataset: object, row: int) -> tuple[object, int]:
    """Return the innermost data set of an item, below subsets and concatenations, and its row there."""
    if isinstance(dataset, Subset):
        return locate(dataset.dataset, int(dataset.indices[row]))
    if isinstance(dataset, ConcatDataset):
        part = bisect_right(dataset.cumulative_sizes, row)
        return locate(dataset.datasets[part], row - (dataset.cumulative_sizes[part - 1] if part else 0))
    return dataset, row


def _drop_key(item: object, key: str) -> object:
    if isinstance(item, Mapping) and key in item:
        return {name: item[name] for name in item if name != key}
    return item
