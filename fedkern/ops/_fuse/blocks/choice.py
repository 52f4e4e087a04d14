"""Choice of FusedBlocks' lowering: the cheapest one by a table of costs measured on processors like this one.

The user's own table (``python -m fedkern.run tune``) goes before the tables shipped with fedkern.
``FEDKERN_LOWERINGS=shipped`` ignores the user's own table, ``FEDKERN_LOWERINGS=FILE`` names a table to use.  On a
processor that no table covers, the choice is ``"separate"`` unless all shipped tables see another lowering far ahead.
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
from fedkern.ops._core import backend
from fedkern.ops._core.loading import Unavailable
from fedkern.ops._core.processor import Processor, processor
from fedkern.ops._fuse.blocks.lowering_costs import LOWERINGS, Table, Work, read_table

SHIPPED = Path(__file__).with_name("tables")
VARIABLE = "FEDKERN_LOWERINGS"
TUNE = "python -m fedkern.run tune"

# How many times faster than separate calls a lowering must be: in a table of this processor and number of threads (the
# differences of repeated measurements), of another number of threads, and of other processors.  The direct lowering's
# lead at width 20 and 32x32 was 1.9 on an EPYC and less than 0.9 on a Xeon.
NOISE, OTHER_THREADS, OTHER_PROCESSOR = 1.03, 1.25, 2.5


class Serving(NamedTuple):
    """The table that decides on this processor.

    Attributes:
        kind: ``"own"``, ``"shipped"``, ``"named"`` (by ``FEDKERN_LOWERINGS``) or ``"none"``: no table covers this
            processor.
        tables: one table, or with ``"none"`` all shipped tables.
        path: the table's file; None with ``"none"``.
        digest: digest of the tables, which a run's bits depend on.
        isa: the active ISA level of the CPU core, "none" where there is no core.
        problem: why the user's own table is ignored, as a sentence; "" if it is not.
    """

    kind: str
    tables: tuple[Table, ...]
    path: Path | None
    digest: str
    isa: str
    problem: str = ""


def choose(works: Sequence[Work], branches: int, channels_last: bool, direct: bool) -> str:
    """The cheapest lowering of M branches on the CPU; ``"separate"`` where no lowering is far enough ahead of it.

    Args:
        works: a block's layers.
        branches: M.
        channels_last: layout of the blocks' input.
        direct: whether ``"direct"`` can serve.

    Raises:
        ValueError: ``FEDKERN_LOWERINGS`` does not name a table.
    """
    if not works:
        return "grouped"
    if problem := untold():
        warnings.warn(problem, stacklevel=2)
    found, threads = serving(), torch.get_num_threads()
    leads = [math.inf] * len(LOWERINGS)  # over separate calls, the least of all tables, in units of the margin
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
        named: a value to use instead of ``FEDKERN_LOWERINGS``; None reads the variable.

    Raises:
        ValueError: ``FEDKERN_LOWERINGS`` does not name a table.
    """
    named = os.environ.get(VARIABLE, "") if named is None else named
    return _serving(processor(), active_isa(), named)


def untold() -> str:
    """Why the user's own table is ignored, on the first call only; "" on later calls or if it is not ignored."""
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
    """Path of the user's own table for this processor and ISA level, existing or not; None without a home folder."""
    return processor().cache_file("lowerings", active_isa())


@functools.cache
def shipped() -> tuple[tuple[Path, Table], ...]:
    """The tables that come with fedkern."""
    return tuple((path, read_table(path)) for path in sorted(SHIPPED.glob("*.json")))


def forget() -> None:
    """Makes the next call of :func:`serving` read and choose a table again; shipped tables are not read again."""
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
    # A table measured at another ISA level still gives the costs of the other lowerings: only "direct" uses the core.
    of_here = [entry for entry in shipped() if entry[1].covers(here)]
    for path, table in sorted(of_here, key=lambda entry: entry[1].isa != isa):
        return Serving("shipped", (table,), path, table.digest, isa, problem)
    tables = tuple(table for _, table in shipped())
    digest = hashlib.sha256(" ".join(["none", *(table.digest for table in tables)]).encode()).hexdigest()[:16]
    return Serving("none", tables, None, digest, isa, problem)
