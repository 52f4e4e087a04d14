"""Which way FusedBlocks computes: the cheapest by the table that was measured on processors like this one.

A table of one's own (``python -m fedkern.run tune``) serves before those that come with fedkern.
``FEDKERN_LOWERINGS=shipped`` leaves one's own out, ``FEDKERN_LOWERINGS=FILE`` names one.  On a processor that no table
is of, branch after branch is computed unless every table sees another way far ahead.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fedkern import files
from fedkern.errors import MESSAGE, UserError, printable_name
from fedkern.inputs import standing
from fedkern.ops import backend
from fedkern.ops.fuse_table import LOWERINGS, Table, Work, read_table
from fedkern.ops.loading import Unavailable
from fedkern.ops.processor import Processor, processor

SHIPPED = Path(__file__).with_name("tables")
VARIABLE = "FEDKERN_LOWERINGS"
TUNE = "python -m fedkern.run tune"

# How far ahead of separate calls a way must be, in times: what repeated measurements differ by; measured on another
# number of threads; measured on other processors alone. From an EPYC to a Xeon, the direct way's lead at width 20 and
# 32x32 was seen to go from 1.9 to less than 0.9.
NOISE, OTHER_THREADS, OTHER_PROCESSOR = 1.03, 1.25, 2.5


class Serving(NamedTuple):
    """What decides here.

    Attributes:
        kind: ``"own"``, ``"shipped"``, ``"named"`` (by ``FEDKERN_LOWERINGS``) or ``"none"``: no table is of this
            processor.
        tables: one, or with ``"none"`` all that come with fedkern.
        path: the table's file; None with ``"none"``.
        digest: of the tables; what a run's bits depend on.
        isa: the active ISA level of the CPU core, "none" where there is no core.
        problem: why a table of one's own is ignored, as a sentence, or "".
    """

    kind: str
    tables: tuple[Table, ...]
    path: Path | None
    digest: str
    isa: str
    problem: str = ""


def choose(works: Sequence[Work], branches: int, channels_last: bool, direct: bool) -> str:
    """The lowering of M branches that costs least on the CPU; ``"separate"`` where none is ahead by more than noise.

    Args:
        works: a block's layers.
        branches: M.
        channels_last: layout of the blocks' input.
        direct: whether ``"direct"`` can serve.

    Raises:
        ValueError: ``FEDKERN_LOWERINGS`` names no table.
    """
    if not works:
        return "grouped"
    if problem := untold():
        warnings.warn(problem, stacklevel=2)
    found, threads = serving(), torch.get_num_threads()
    leads = [math.inf] * len(LOWERINGS)  # over separate calls, in the table that sees the least of it
    for table in found.tables:
        nearest = table.nearest_threads(threads)
        margin = OTHER_PROCESSOR if found.kind == "none" else NOISE if nearest == threads else OTHER_THREADS
        totals = table.totals(works, branches, channels_last, nearest)
        if not direct or table.isa != found.isa:
            totals[LOWERINGS.index("direct")] = math.inf
        separate = totals[LOWERINGS.index("separate")]
        leads = [min(lead, separate / (margin * total)) for lead, total in zip(leads, totals, strict=True)]
    leads[LOWERINGS.index("separate")] = 1.0
    return LOWERINGS[leads.index(max(leads))]


def serving(named: str | None = None) -> Serving:
    """The table that decides on this processor; files are read once, see :func:`forget`.

    Args:
        named: what stands in the place of ``FEDKERN_LOWERINGS``; None for what that says.

    Raises:
        ValueError: ``FEDKERN_LOWERINGS`` names no table.
    """
    named = os.environ.get(VARIABLE, "") if named is None else named
    return _serving(processor(), active_isa(), named)


def untold() -> str:
    """Why a table of one's own is ignored, the first time that this is asked for; then, and where none is, ""."""
    problem = serving().problem
    if problem in _told:
        return ""
    _told.add(problem)
    return problem


_told: set[str] = set()


def active_isa() -> str:
    """The active ISA level of the CPU core, "none" where there is no core."""
    try:
        return str(backend.cpu_core().isa())
    except Unavailable:
        return "none"


def own_file() -> Path | None:
    """Where one's own table of this processor and ISA level lies, or would; None where the user has no home folder."""
    return processor().cache_file("lowerings", active_isa())


@functools.cache
def shipped() -> tuple[tuple[Path, Table], ...]:
    """The tables that come with fedkern."""
    return tuple((path, read_table(path)) for path in sorted(SHIPPED.glob("*.json")))


def forget() -> None:
    """Has the tables read again."""
    _serving.cache_clear()
    _told.clear()


@functools.cache
def _serving(here: Processor, isa: str, named: str) -> Serving:
    if named and named != "shipped":
        try:
            path = files.expand(named)
            table = read_table(path)
        except (OSError, ValueError, UserError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{VARIABLE} names {named}, which is no table of lowerings ({reason}); it takes shipped or a file that "
                f"{TUNE} --out has written"
            ) from None
        return Serving("named", (table,), path, table.digest, isa)
    problem, own = "", None if named else own_file()
    if own is not None and standing(own) != "missing":
        try:
            table = read_table(own)
            if not table.covers(here) or table.isa != isa:
                raise ValueError(f"it was measured on {table.where}")
            return Serving("own", (table,), own, table.digest, isa)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            problem = f"{own} is ignored, it is no table of this processor's lowerings ({reason}): run {TUNE} again."
            problem = printable_name(problem, MESSAGE)
    # A table measured with another ISA level tells the other lowerings' costs all the same.
    of_here = [entry for entry in shipped() if entry[1].covers(here)]
    for path, table in sorted(of_here, key=lambda entry: entry[1].isa != isa):
        return Serving("shipped", (table,), path, table.digest, isa, problem)
    tables = tuple(table for _, table in shipped())
    digest = hashlib.sha256(" ".join(["none", *(table.digest for table in tables)]).encode()).hexdigest()[:16]
    return Serving("none", tables, None, digest, isa, problem)
