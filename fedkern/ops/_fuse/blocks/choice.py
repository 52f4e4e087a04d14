"""Choice of FusedBlocks' lowering on the CPU, by the sizes of a block's convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LOWERINGS = ("grouped", "separate", "direct")

# The direct lowering's lanes run over positions.  It needs large maps, and gains where few channels leave oneDNN's
# lanes empty.  Many channels fill them; a branch alone then reads each map while the map is still in the cache.
LARGE, WIDE = 16, 64


class Work(NamedTuple):
    """One convolution of a block.

    Attributes:
        kernel: taps of the kernel.
        width: channels that a branch writes.
        size: geometric mean of the result's height and width.
        amount: multiplications per sample and branch.
    """

    kernel: int
    width: int
    size: float
    amount: float


def choose(works: Sequence[Work], channels_last: bool, direct: bool) -> str:
    """The lowering that suits more than half of a block's multiplications; ``"grouped"`` where none does.

    In a channels-last input 1x1 convolutions (adaptors) are fastest as they are.
    """
    half = sum(work.amount for work in works) / 2
    narrow = (w.amount for w in works if w.size >= LARGE and (w.width < WIDE if w.kernel > 1 else not channels_last))
    if direct and sum(narrow) > half:
        return "direct"
    wide = (work.amount for work in works if work.kernel > 1 and work.width >= WIDE)
    return "separate" if sum(wide) > half else "grouped"
