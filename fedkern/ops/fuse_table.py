"""Which way FusedBlocks computes: a table of what measured fastest, looked up by the nearest setting.

``python benchmarks/tune_fuse.py --write`` measures the rows anew.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

LOWERINGS = ("grouped", "separate", "direct")


class Row(NamedTuple):
    """One measured setting, forward with a batch of 64 on one thread.

    Attributes:
        kind: ``"spatial"`` (blocks with 3x3 convolutions, folded), ``"pointwise"`` (1x1 ones alone, as adaptors are) or
            ``"recorded"`` (forward and backward in training mode).
        branches: M.
        width: channels of one branch.
        size: height and width of the map.
        channels_last: layout of the input.
        lowering: the fastest of :data:`LOWERINGS`.
    """

    kind: str
    branches: int
    width: int
    size: int
    channels_last: bool
    lowering: str


ROWS: tuple[Row, ...] = (
    Row("pointwise", 5, 14, 16, False, "direct"),
    Row("pointwise", 5, 14, 16, True, "grouped"),
    Row("pointwise", 5, 14, 32, False, "direct"),
    Row("pointwise", 5, 14, 32, True, "grouped"),
    Row("pointwise", 5, 20, 16, False, "direct"),
    Row("pointwise", 5, 20, 16, True, "grouped"),
    Row("pointwise", 5, 20, 32, False, "direct"),
    Row("pointwise", 5, 20, 32, True, "grouped"),
    Row("pointwise", 5, 29, 16, False, "direct"),
    Row("pointwise", 5, 29, 16, True, "grouped"),
    Row("pointwise", 5, 29, 32, False, "direct"),
    Row("pointwise", 5, 29, 32, True, "grouped"),
    Row("pointwise", 5, 64, 16, False, "direct"),
    Row("pointwise", 5, 64, 16, True, "grouped"),
    Row("pointwise", 5, 64, 32, False, "direct"),
    Row("pointwise", 5, 64, 32, True, "grouped"),
    Row("pointwise", 10, 14, 16, False, "direct"),
    Row("pointwise", 10, 14, 16, True, "grouped"),
    Row("pointwise", 10, 14, 32, False, "direct"),
    Row("pointwise", 10, 14, 32, True, "grouped"),
    Row("pointwise", 10, 20, 16, False, "direct"),
    Row("pointwise", 10, 20, 16, True, "grouped"),
    Row("pointwise", 10, 20, 32, False, "direct"),
    Row("pointwise", 10, 20, 32, True, "grouped"),
    Row("pointwise", 10, 29, 16, False, "direct"),
    Row("pointwise", 10, 29, 16, True, "grouped"),
    Row("pointwise", 10, 29, 32, False, "direct"),
    Row("pointwise", 10, 29, 32, True, "grouped"),
    Row("pointwise", 10, 64, 16, False, "direct"),
    Row("pointwise", 10, 64, 16, True, "grouped"),
    Row("pointwise", 20, 20, 16, True, "grouped"),
    Row("pointwise", 20, 29, 16, False, "direct"),
    Row("pointwise", 20, 29, 16, True, "grouped"),
    Row("recorded", 5, 20, 16, False, "grouped"),
    Row("recorded", 10, 20, 16, False, "grouped"),
    Row("recorded", 10, 64, 16, False, "separate"),
    Row("spatial", 5, 14, 16, False, "direct"),
    Row("spatial", 5, 14, 32, False, "direct"),
    Row("spatial", 5, 20, 16, False, "direct"),
    Row("spatial", 5, 20, 32, False, "direct"),
    Row("spatial", 5, 29, 16, False, "direct"),
    Row("spatial", 5, 29, 32, False, "direct"),
    Row("spatial", 5, 64, 16, False, "direct"),
    Row("spatial", 5, 64, 32, False, "direct"),
    Row("spatial", 10, 14, 16, False, "direct"),
    Row("spatial", 10, 14, 32, False, "direct"),
    Row("spatial", 10, 20, 16, False, "direct"),
    Row("spatial", 10, 20, 32, False, "direct"),
    Row("spatial", 10, 29, 16, False, "direct"),
    Row("spatial", 10, 29, 32, False, "direct"),
    Row("spatial", 10, 64, 16, False, "separate"),
    Row("spatial", 10, 64, 32, False, "separate"),
    Row("spatial", 20, 14, 16, False, "direct"),
    Row("spatial", 20, 14, 32, False, "direct"),
    Row("spatial", 20, 20, 16, False, "direct"),
    Row("spatial", 20, 20, 32, False, "direct"),
    Row("spatial", 20, 29, 16, False, "direct"),
    Row("spatial", 20, 29, 32, False, "direct"),
    Row("spatial", 20, 64, 16, False, "separate"),
    Row("spatial", 20, 64, 32, False, "separate"),
)


@functools.lru_cache(maxsize=4096)
def choose(kind: str, branches: int, width: int, height: int, row: int, channels_last: bool, device: str) -> str:
    """The lowering for M branches of ``width`` channels on maps of ``height`` by ``row``: that of the nearest setting.

    Other devices than the CPU take grouped convolutions, which their libraries do in one launch.
    """
    if device != "cpu":
        return "grouped"
    wanted = (max(branches, 1), max(width, 1), max(math.sqrt(height * row), 1.0))

    def distance(measured: Row) -> float:
        given = (measured.branches, measured.width, measured.size)
        return sum(abs(math.log(a / b)) for a, b in zip(given, wanted, strict=True))

    layouts = (False,) if kind in ("spatial", "recorded") else (channels_last,)
    return min((r for r in ROWS if r.kind == kind and r.channels_last in layouts), key=distance).lowering
