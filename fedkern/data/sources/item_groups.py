"""Groups of items: patient or site of every item of a PyTorch data set."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, default_collate

from fedkern.data.labels.spelling import clean_cell, parse_number
from fedkern.data.sharing.groups import hash_names
from fedkern.data.sources.items import Items, locate, name_cause
from fedkern.errors import RAISED, UserError, format_value
from fedkern.messages.leaves import TARGETS

WAY = "give the name of an attribute, a column or a key of items, or a function of an item's index"


class GroupReader:
    """Reader of the groups of data sets.

    ``rule`` names an attribute, a column or an item's key, or is a function of an item's index in the data set below
    subsets and concatenations, whose groups are then distinct.  ``key`` is the item key to hide from the network, into
    whose inputs torch's collation would put it.
    """

    def __init__(self, rule: object, collate: object) -> None:
        if not callable(rule) and not (isinstance(rule, str) and rule):
            raise UserError(f"groups is {format_value(rule)}: {WAY}.")
        self.key = rule if isinstance(rule, str) and rule not in TARGETS and collate is default_collate else ""
        self.names: dict[int, str] = {}
        self._rule: Any = rule
        self._places, self._known = dict[int, int](), dict[int, list[object]]()

    def read(self, split: Items) -> Tensor:
        """Return the hash of every item's group for a whole data set, int64 ``[n]``.

        An item without a group is a group of its own.  Equal numbers are one group, however written.
        """
        try:
            names = [*map(_name, self._values(split))]
        except RAISED as error:  # the user's own code
            rule = format_value(self._rule)
            raise UserError(f"groups={rule} of {split.name} cannot be read ({name_cause(error)}): {WAY}.") from error
        hashes = hash_names(f"patient/{name}" if name else f"item/{split.name}/{row}" for row, name in enumerate(names))
        self.names |= dict(zip(hashes.tolist(), names, strict=True))
        return torch.from_numpy(hashes)

    def _values(self, split: Items) -> list[object]:
        if callable(self._rule):
            return [self._call(*locate(split.dataset, row)) for row in range(len(split))]
        if (values := self._column(split.dataset)) is not None:
            return values
        values = [self._value_of_key(item) for item in replace(split, group_key="").read(range(len(split)), 0)]
        way = "give the data set an attribute or a column of this name"
        warnings.warn(f"All {len(split)} items of {split.name} are read once for their groups: {way}.", stacklevel=7)
        self._known[id(split.dataset)] = values
        return values

    def _call(self, dataset: object, row: int) -> object:
        place, value = self._places.setdefault(id(dataset), len(self._places)), self._rule(row)
        return value if place == 0 or value is None else f"{value} (data set {place})"

    def _value_of_key(self, item: object) -> object:
        if not isinstance(item, Mapping) or self._rule not in item:
            raise UserError("it has no attribute or column of this name, and an item no such key")
        return item[self._rule]

    def _column(self, dataset: Any) -> list[object] | None:
        """Return stated groups of a data set or of those below, or None."""
        if id(dataset) in self._known:
            return self._known[id(dataset)]
        is_column = self._rule in (getattr(dataset, "column_names", None) or ())
        values = dataset[self._rule] if is_column else getattr(dataset, self._rule, None)
        if values is not None:
            values = [*map(values.__getitem__, range(len(dataset)))] if isinstance(values, Mapping) else [*values]
            if len(values) != len(dataset):
                raise UserError(f"there are {len(values)} for {len(dataset)} items")
            return values
        if type(dataset) is Subset:
            below = self._column(dataset.dataset)
            return below and [below[row] for row in dataset.indices]
        parts = [self._column(part) for part in dataset.datasets] if type(dataset) is ConcatDataset else [None]
        return None if None in parts else [value for part in parts for value in part or ()]


def _name(value: Any) -> str:
    value = value.item() if getattr(value, "shape", None) == () else value
    if value is not None and not isinstance(value, (str, int, float)):
        raise UserError(f"one is {format_value(value)}, neither a text nor a number nor None")
    name = clean_cell(str(value))
    amount = parse_number(name)
    return unicodedata.normalize("NFC", name) if amount is None else f"{amount.normalize():f}"
