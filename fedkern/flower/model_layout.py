"""Layout of a model in messages: its entries, and the place of each in one flat vector.

A plain record has an array for every entry. A flat record has one vector of all floating entries, and an array for
every other entry.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedkern import ops
from fedkern.errors import printable_name
from fedkern.flower import array_bytes
from fedkern.flower.array_bytes import FLAT, FLOATS, LISTING, NUMPY, FlowerArray, Header, Misfit

# Elements from which an entry is worth a call of its own: below, the call costs more than copying the entry.
_LARGE = 8192
# Largest fp64 number that a reply may hold: sums over any number of replies, with any weights, are finite.
_LARGEST = 1e280
_VARIANCES = ("running_var", "moving_variance")
_STATISTICS = ("running_mean", "moving_mean", *_VARIANCES)
_MOST_SHOWN = 80


@dataclass(frozen=True)
class Entry:
    """An entry of a model, at ``begin:end`` of the flat vector if it is floating."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    begin: int = 0
    end: int = 0

    @property
    def floating(self) -> bool:
        return self.dtype in FLOATS

    @property
    def variance(self) -> bool:
        return self.floating and self.key.endswith(_VARIANCES)

    @property
    def statistic(self) -> bool:
        """Return whether the entry holds batch norm statistics, which no optimiser may move."""
        return self.floating and self.key.endswith(_STATISTICS)


class Layout:
    """The entries of a model, in order.

    Args:
        forms: key, shape and dtype name of every entry.
        flat: dtype name of a flat model's vector, None for a plain model.

    ``size`` is P, the number of floating elements, and ``dtype`` the widest floating dtype, fp32 without any.
    """

    def __init__(self, forms: Sequence[tuple[str, tuple[int, ...], str]], flat: str | None = None) -> None:
        rows, place, dtype = [], 0, None
        for key, shape, name in forms:
            count = Header(name, shape).elements if name in FLOATS else 0
            rows.append(Entry(key, shape, name, place if name in FLOATS else 0, place + count if name in FLOATS else 0))
            if name in FLOATS:
                place += count
                dtype = FLOATS[name] if dtype is None else torch.promote_types(dtype, FLOATS[name])
        self.entries = tuple(rows)
        self.size = place
        self.dtype = dtype or torch.float32
        self.flat = flat
        self._known: dict[str, tuple[bytes, int, Header]] = {}

    @cached_property
    def floating(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.floating)

    @cached_property
    def integers(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.floating)

    @cached_property
    def variances(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.floating if entry.variance and entry.end > entry.begin)

    @cached_property
    def segments(self) -> tuple[tuple[Entry, ...], ...]:
        """Runs of floating entries of one dtype: a large entry by itself, small neighbours together."""
        runs: list[list[Entry]] = []
        for entry in self.floating:
            large = entry.end - entry.begin >= _LARGE
            alike = bool(runs) and runs[-1][0].dtype == entry.dtype
            if alike and not large and runs[-1][-1].end - runs[-1][0].begin < _LARGE:
                runs[-1].append(entry)
            else:
                runs.append([entry])
        return tuple(map(tuple, runs))

    @cached_property
    def listing(self) -> bytes:
        return json.dumps([[entry.key, list(entry.shape), entry.dtype] for entry in self.entries]).encode()

    def form(self, key: str, array: FlowerArray) -> Header:
        """Cache :func:`array_bytes.read_header`, as a round's arrays mostly begin with the same bytes."""
        data = array.data
        entry = self._known.get(key)
        plain = array.stype == NUMPY and type(data) is bytes
        if plain and entry is not None and len(data) == entry[1] and data.startswith(entry[0]):
            return entry[2]
        form = array_bytes.read_header(array, _name(key))
        if plain:
            self._known[key] = (data[: form.begin], len(data), form)
        return form

    @classmethod
    def of(cls, record: Mapping[str, FlowerArray]) -> Layout:
        if FLAT not in record:
            forms = {key: array_bytes.read_header(array, _name(key)) for key, array in record.items()}
            return cls([(key, form.shape, form.dtype) for key, form in forms.items()])
        layout = cls(_read_listing(record), record[FLAT].dtype)
        Model(record, layout)  # checks the vector's length, and the other arrays
        return layout


def _read_listing(record: Mapping[str, FlowerArray]) -> list[tuple[str, tuple[int, ...], str]]:
    if LISTING not in record:
        raise Misfit("keys", f"has {FLAT!r} but lacks {LISTING!r}")
    try:
        rows = [(key, tuple(shape), dtype) for key, shape, dtype in json.loads(record[LISTING].data)]
        good = all(isinstance(key, str) and isinstance(dtype, str) for key, _, dtype in rows)
        good = good and all(array_bytes.is_shape(shape) for _, shape, _ in rows)
    except (ValueError, TypeError, RecursionError):
        good, rows = False, []
    if not good or len({row[0] for row in rows}) != len(rows):
        raise Misfit("keys", f"has a list of entries under {LISTING!r} that cannot be read")
    return rows


class Model:
    """A record that fits a layout (else Misfit is raised): its numbers, in the record's own memory.

    Any floating dtype fits a floating entry. Infinities of the model ``sent`` may stand in the same places here.
    """

    def __init__(self, record: Mapping[str, FlowerArray], layout: Layout, sent: Model | None = None) -> None:
        self._layout, self._sent = layout, sent
        self._vector: Tensor | None = None
        self._arrays: dict[str, tuple[FlowerArray, Header]] = {}
        self._dtypes: set[tuple[str, str]] = set()  # of the entries, as they came and as the layout has them
        self.nbytes = 0
        """Bytes of the floating entries."""
        self.integers: dict[str, np.ndarray] = {}
        """The entries that are not floating, by key."""
        keys = set(record)
        if FLAT in keys:
            self._read_flat(record, keys)
        else:
            _check_keys(keys, {entry.key for entry in layout.entries})
        for entry in layout.entries:
            if self._vector is not None and entry.floating:
                continue
            array = record[entry.key]
            form = layout.form(entry.key, array)
            if form.shape != entry.shape:
                name = _name(entry.key)
                raise Misfit("shapes", f"has {name} of shape {list(form.shape)} where {list(entry.shape)} is expected")
            if entry.floating and form.dtype in FLOATS:
                self._arrays[entry.key] = array, form
                self._dtypes.add((form.dtype, entry.dtype))
                self.nbytes += len(array.data) - form.begin
            elif form.dtype == entry.dtype:
                self.integers[entry.key] = array_bytes.as_numpy(array, form)
            else:
                expected = "a floating dtype" if entry.floating else entry.dtype
                raise Misfit("dtypes", f"has {_name(entry.key)} of {form.dtype} where {expected} is expected")

    def _read_flat(self, record: Mapping[str, FlowerArray], keys: set[str]) -> None:
        layout = self._layout
        if LISTING not in keys or record[LISTING].data != layout.listing:
            listed = {key: (shape, dtype in FLOATS, dtype) for key, shape, dtype in _read_listing(record)}
            _check_keys(set(listed), {entry.key for entry in layout.entries})
            if list(listed) != [entry.key for entry in layout.entries]:
                raise Misfit("keys", "lists the entries of its flat vector in another order than the global model's")
            for entry in layout.entries:
                shape, floating, dtype = listed[entry.key]
                name = _name(entry.key)
                if shape != entry.shape:
                    raise Misfit("shapes", f"has {name} of shape {list(shape)} where {list(entry.shape)} is expected")
                if floating != entry.floating:
                    raise Misfit("dtypes", f"has {name} of {dtype[:20]} where {entry.dtype} is expected")
        _check_keys(keys - {FLAT, LISTING}, {entry.key for entry in layout.integers})
        form = array_bytes.read_header(record[FLAT], FLAT)
        if record[FLAT].stype != FLAT:
            raise Misfit("dtypes", f"has {FLAT!r} in another encoding than its own")
        if form.shape != (layout.size,):
            raise Misfit("size", f"has a flat vector of {form.elements} elements where {layout.size} are expected")
        self._vector = array_bytes.as_tensor(record[FLAT], form)
        self._dtypes = {(form.dtype, entry.dtype) for entry in layout.floating}
        self.nbytes = self._vector.nbytes

    def entry(self, entry: Entry) -> Tensor:
        if self._vector is not None:
            return self._vector[entry.begin : entry.end]
        return array_bytes.as_tensor(*self._arrays[entry.key])

    def segment(self, run: Sequence[Entry]) -> Tensor:
        """Return the numbers of neighbouring floating entries, ``[n]``. Several arrays are copied together."""
        if self._vector is not None:
            return self._vector[run[0].begin : run[-1].end]
        return array_bytes.join_tensors([self._arrays[entry.key] for entry in run])

    def segments(self) -> Iterator[Tensor]:
        return (self.segment(run) for run in self._layout.segments)

    def vector(self) -> Tensor:
        """Return all floating entries, ``[P]`` in the layout's dtype, without a copy if possible."""
        if self._vector is not None:
            return self._vector.to(self._layout.dtype)
        parts = list(self.segments())
        return torch.cat(parts).to(self._layout.dtype) if parts else torch.empty(0, dtype=self._layout.dtype)

    def check_numbers(self, *, but_for_sums: bool = False) -> None:
        self.check_finite(but_for_sums)
        self.check_variances()

    def check_finite(self, but_for_sums: bool = False) -> None:
        """Raise Misfit if a number is not finite in the new model's dtype, except for an infinity that was sent.

        ``but_for_sums`` skips numbers whose faults show in a sum in fp64.
        """
        flat = self._layout.flat
        if but_for_sums and all(_shows_in_sums(FLOATS[old], FLOATS[flat or new]) for old, new in self._dtypes):
            return
        for run in self._layout.segments:
            kind = FLOATS[flat or run[0].dtype]
            if not _all_good(self.segment(run), kind):
                bad = next((entry for entry in run if not _all_good(self._without_sent_infinities(entry), kind)), None)
                if bad is None:
                    continue
                raise Misfit("finite", f"holds NaN, infinite or too large values in {_name(bad.key)}")

    def _without_sent_infinities(self, entry: Entry) -> Tensor:
        """Return a floating entry with 0 in place of infinities that were sent, as in a causal mask."""
        data = self.entry(entry)
        return data if self._sent is None else data.masked_fill(data.isinf() & (data == self._sent.entry(entry)), 0.0)

    def check_variances(self) -> None:
        entries = self._layout.variances
        if self._vector is None and entries:
            lowest = float(array_bytes.join_tensors([self._arrays[entry.key] for entry in entries]).min())
            if not lowest < 0:
                return
        for entry in entries:
            if float(self.entry(entry).min()) < 0:
                self.check_finite()
                raise Misfit("variance", f"has negative variances in {_name(entry.key)}")

    def distance(self, start: Model) -> float:
        """Return the Euclidean distance over all floating entries, in fp64."""
        parts = []
        for part, start_part in zip(self.segments(), start.segments(), strict=True):
            wide = torch.promote_types(part.dtype, start_part.dtype)
            parts.append(float(ops.pairwise_distances([part.to(wide), start_part.to(wide)])[0, 1]))
        return math.hypot(*parts)

    def norm(self) -> float:
        return math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in self.segments()))


def _all_good(part: Tensor, kind: torch.dtype) -> bool:
    """Return whether all numbers are finite, also as ``kind``, and far from overflowing a sum."""
    if not part.numel():
        return True
    if part.dtype == torch.float64:
        return float(part.abs().max()) <= min(torch.finfo(kind).max, _LARGEST)
    if kind.itemsize == 2 and part.dtype != kind:
        return bool(torch.isfinite(part.to(kind)).all())
    # One pass that writes nothing, unless the sum overflows.
    return bool(torch.isfinite(part.sum())) or bool(torch.isfinite(part).all())


def _shows_in_sums(dtype: torch.dtype, kind: torch.dtype) -> bool:
    return dtype != torch.float64 and (kind.itemsize > 2 or dtype == kind)


def _check_keys(keys: set[str], expected: set[str]) -> None:
    for key in sorted(expected - keys):
        raise Misfit("keys", f"lacks {_name(key)}")
    for key in sorted(keys - expected):
        raise Misfit("keys", f"should not hold {_name(key)}")


def _name(key: str) -> str:
    return repr(printable_name(key, _MOST_SHOWN))
