"""Measured costs of FusedBlocks' lowerings: the rows, their sums over a block's layers, and their file.

``python -m fedkern.run tune`` measures the rows (``fuse_tune``); ``fuse_choice`` decides by them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedkern import files
from fedkern.inputs import open_regular, parse_json
from fedkern.ops._core.processor import Processor

LOWERINGS = ("grouped", "separate", "direct")
KINDS = ("spatial", "stem", "pointwise", "halve", "pool", "recorded")

# Channels of one of oneDNN's vectors.  oneDNN pads other numbers of channels, or goes channel by channel: rows of whole
# vectors are therefore far from rows of others.
VECTOR = 16
VECTOR_WEIGHT = 1.0

# Images have no more channels than this.
IMAGE = 4

# The number of branches matters little: rows with another number are nearer than rows of another width or size.
BRANCHES_WEIGHT = 0.25

FORMAT = 1
HEAD = ("vendor", "family", "models", "name", "isa", "torch", "measured")
LARGEST = 4 << 20  # most bytes of a file that is read
COUNT = 1 << 20  # most branches, channels, positions and threads


class Row(NamedTuple):
    """Measured costs of one kind of layer, with a batch of 64.

    Costs are nanoseconds per 1000 multiplications; for pools, per 1000 values read.

    Attributes:
        kind: ``"spatial"`` (folded 3x3 convolutions), ``"stem"`` (3x3 convolutions that read one image of few channels
            for all branches), ``"pointwise"`` (1x1 convolutions that read all branches' channels, as adaptors do),
            ``"halve"`` (2x2 max pooling), ``"pool"`` (other pools, measured as 3x3 max pooling of stride 2) or
            ``"recorded"`` (convolution and batch norm, forward and backward in training mode).
        branches: M.
        width: channels of one branch.
        size: height and width of the result; for a pool, of the input.
        channels_last: layout of the blocks' input, which matters only to ``"pointwise"``.
        grouped, separate, direct: the lowerings' costs; None where ``"direct"`` does not exist.
    """

    kind: str
    branches: int
    width: int
    size: int
    channels_last: bool
    grouped: float
    separate: float
    direct: float | None


class Work(NamedTuple):
    """One layer of a block.

    Attributes:
        kind: kind of the :class:`Row` that gives its cost.
        width: channels of one branch; for a 3x3 convolution, the geometric mean of channels read and written.
        whole: whether the channels are whole vectors of :data:`VECTOR`.
        size: as in :class:`Row`, but the geometric mean of height and width.
        amount: multiplications (for a pool: values read) per sample and branch.
    """

    kind: str
    width: float
    whole: bool
    size: float
    amount: float


@dataclass(frozen=True, eq=False)
class Table:
    """Rows by the number of threads that they were measured on, and the processor.

    Attributes:
        vendor, family: of the processor, see :class:`~fedkern.ops._core.processor.Processor`.
        models: ranges (first, last) of the processor models that are built alike.
        name: the processors' name.
        isa: ISA level of the CPU core, which the direct lowering's costs depend on; "none" where there was no core.
        torch: the version of PyTorch.
        measured: the day, as an ISO date.
        rows: rows of all kinds, by number of threads.
    """

    vendor: str
    family: int
    models: tuple[tuple[int, int], ...]
    name: str
    isa: str
    torch: str
    measured: str
    rows: Mapping[int, tuple[Row, ...]] = field(repr=False)

    def covers(self, processor: Processor) -> bool:
        """Whether the table was measured on processors that are built like ``processor``."""
        same = (self.vendor, self.family) == (processor.vendor, processor.family)
        return same and any(first <= processor.model <= last for first, last in self.models)

    @property
    def where(self) -> str:
        """The processor in words."""
        models = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in self.models)
        return f"{self.name} ({self.vendor or 'unknown vendor'} family {self.family}, model {models}; {self.isa})"

    def text(self) -> str:
        """The file's content."""
        head = {name: getattr(self, name) for name in HEAD}
        lines = [f'{{"format": {FORMAT}, {json.dumps(head)[1:-1]}, "rows": {{']
        for i, (threads, rows) in enumerate(sorted(self.rows.items())):
            each = ",\n".join(f"  {json.dumps(row)}" for row in sorted(rows, key=lambda row: row[:5]))
            lines.append(f'{"," if i else ""} "{threads}": [\n{each}\n ]')
        return "\n".join([*lines, "}}", ""])

    @functools.cached_property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of :meth:`text`."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]

    def nearest_threads(self, threads: int) -> int:
        """The measured number of threads nearest to ``threads``; the smaller one of two."""
        return min(sorted(self.rows), key=lambda count: abs(math.log(count / max(threads, 1))))

    def totals(self, works: Sequence[Work], branches: int, channels_last: bool, threads: int) -> list[float]:
        """Cost of a block's layers by each of :data:`LOWERINGS`; inf for a lowering that cannot compute them.

        Each layer costs what its nearest row says.  ``threads``: one of the numbers in ``rows``.
        """
        totals = [0.0] * len(LOWERINGS)
        for work in works:
            width, size = max(work.width, 1.0), max(work.size, 1.0)
            row = nearest(self, threads, work.kind, max(branches, 1), width, work.whole, size, channels_last)
            for way, cost in enumerate((row.grouped, row.separate, row.direct)):
                totals[way] += math.inf if cost is None else cost * work.amount
        return totals


@functools.lru_cache(maxsize=4096)
def nearest(
    table: Table, threads: int, kind: str, branches: int, width: float, whole: bool, size: float, channels_last: bool
) -> Row:
    """The row of this kind that is nearest in branches, whole vectors, width and size."""

    def distance(row: Row) -> float:
        apart = BRANCHES_WEIGHT * abs(math.log(row.branches / branches))
        apart += VECTOR_WEIGHT * ((row.width % VECTOR == 0) != whole)
        return apart + abs(math.log(row.width / width)) + abs(math.log(row.size / size))

    last = channels_last and kind == "pointwise"
    return min((row for row in table.rows[threads] if row.kind == kind and row.channels_last == last), key=distance)


def write_table(table: Table, path: Path) -> None:
    """Writes the table's file, completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    files.replace(path, lambda temporary: temporary.write_text(table.text()))


def read_table(path: Path) -> Table:
    """Reads a table.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a table; the message is a clause that says why.
    """
    with open_regular(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    try:
        found = parse_json(content.decode())
    except ValueError:
        raise ValueError("it is no JSON") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is no table of format {FORMAT}")
    try:
        texts = [_text(found[name]) for name in ("vendor", "name", "isa", "torch", "measured")]
        models = tuple((_count(first, 0), _count(last, 0)) for first, last in found["models"])
        rows = {_count(int(threads)): _rows(each) for threads, each in found["rows"].items()}
        family = _count(found["family"], 0)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(str(error) if isinstance(error, _Wrong) else "it lacks what a table has") from None
    if not rows:
        raise ValueError("it has no rows")
    vendor, name, isa, torch, measured = texts
    return Table(vendor, family, models, name, isa, torch, measured, rows)


class _Wrong(ValueError):
    """An error in a file, with a message that can be shown to the user."""


def _rows(given: Any) -> tuple[Row, ...]:
    rows = []
    for kind, branches, width, size, last, grouped, separate, direct in given:
        if kind not in KINDS or not isinstance(last, bool):
            raise _Wrong(f"it has a row of the unknown kind {kind!r:.40}")
        made = Row(kind, _count(branches), _count(width), _count(size), last, _cost(grouped), _cost(separate), None)
        rows.append(made._replace(direct=None if direct is None else _cost(direct)))
    there = {(row.kind, row.channels_last) for row in rows}
    for kind in KINDS:
        for last in (False, True) if kind == "pointwise" else (False,):
            if (kind, last) not in there:
                raise _Wrong(f"it has no row of the kind {kind}")
    return tuple(rows)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _count(value: Any, low: int = 1) -> int:
    if type(value) is not int or not low <= value <= COUNT:
        raise _Wrong(f"it has {value!r:.40} where a whole number of at least {low} belongs")
    return value


def _cost(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise _Wrong(f"it has the cost {value!r:.40}")
    return float(value)
