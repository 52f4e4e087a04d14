"""Rows in memory, for items that are the same whenever they are read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from fedkern.messages.leaves import leaves, map_leaves

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
