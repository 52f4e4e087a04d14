"""Tables of lowerings for tests."""

from __future__ import annotations

from collections.abc import Iterable

from fedkern.ops._core.processor import processor
from fedkern.ops._fuse.blocks.choice import active_isa
from fedkern.ops._fuse.blocks.lowering_costs import KINDS, Row, Table


def made(
    grouped: float, separate: float, direct: float | None, *, threads: Iterable[int] = (1,), isa: str | None = None
) -> Table:
    """A table of this processor where every layer costs the same."""
    rows = tuple(
        Row(kind, 5, width, 16, last, grouped, separate, None if kind == "recorded" else direct)
        for kind in KINDS
        for width in (16, 20)
        for last in ((False, True) if kind == "pointwise" else (False,))
    )
    here = processor()
    return Table(
        vendor=here.vendor,
        family=max(here.family, 0),
        models=((max(here.model, 0),) * 2,),
        name="a processor",
        isa=active_isa() if isa is None else isa,
        torch="2.13.0",
        measured="2026-01-01",
        rows=dict.fromkeys(threads, rows),
    )
