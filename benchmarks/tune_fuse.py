"""Measures FusedBlocks' lowerings and writes the table they are chosen from, ``fedkern/ops/fuse_table.py``.

    python benchmarks/tune_fuse.py [--write] [--only KIND]

Each setting is timed on one thread, the lowerings in turn, in seconds of the thread's own processor time (a busy
machine takes turns away from all alike); the fastest of the repetitions counts.  About ten minutes; run it on the
machine that the table is meant for.  With ``--write`` every row is written when it is measured, so that a run which is
interrupted leaves a table of new and earlier rows.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedkern.ops import FusedBlocks, fuse_table
from fedkern.ops.fuse_lowering import halved
from fedkern.ops.fuse_table import LOWERINGS, Row

BATCH = 64
COLOURS = 3
LAYERS = 3  # of a chain: what blocks do at their ends shall not count for much
TABLE = Path(fuse_table.__file__).resolve()
CHECKOUT = Path(__file__).resolve().parent.parent
BRANCHES, WIDTHS, SIZES = (5, 10), (14, 16, 20, 29, 32, 40, 64, 128), (32, 16, 8, 4, 2)
# Of one layer's multiplications for a batch: memory, and minutes.  Beyond them costs change no more.
LEAST, MOST = 1 << 22, 3 << 30
KINDS = ("spatial", "stem", "pointwise", "halve", "pool", "recorded")
POOLS = ("halve", "pool")


class Setting(NamedTuple):
    """What a row is measured for; the fields are the row's."""

    kind: str
    branches: int
    width: int
    size: int
    channels_last: bool

    @property
    def amount(self) -> float:
        """Multiplications (of a pool: values read) of a layer."""
        m, width = self.branches, self.width
        times = {"halve": 1, "pool": 1, "pointwise": m * width, "stem": 9 * COLOURS}.get(self.kind, 9 * width)
        return float(BATCH * m * width * self.size**2 * times)


def settings() -> Iterator[Setting]:
    for kind in KINDS:
        for m in BRANCHES:
            for width in WIDTHS:
                for size in SIZES:
                    for last in (False, True) if kind == "pointwise" else (False,):
                        made = Setting(kind, m, width, size, last)
                        if kind in POOLS and (m > BRANCHES[0] or width not in (16, 64) or size < 4):
                            continue
                        if (kind == "stem" and size < 8) or (kind == "pointwise" and width == 16):
                            continue
                        if kind == "recorded" and (width not in (16, 20, 64, 128) or size > 16):
                            continue
                        if (made.amount >= LEAST or kind in (*POOLS, "stem")) and made.amount <= MOST:
                            yield made


def runs(setting: Setting) -> tuple[dict[str, Callable[[], object]], float]:
    """The lowerings by name, and how many of the setting's multiplications one run does."""
    kind, m, width, size, last = setting
    recorded = kind == "recorded"

    def block() -> nn.Module:
        if kind == "pointwise":
            return nn.Conv2d(m * width, width, 1)
        if kind == "stem":
            return nn.Conv2d(COLOURS, width, 3, padding=1)
        if kind in POOLS:
            return nn.MaxPool2d(2) if kind == "halve" else nn.MaxPool2d(3, stride=2, padding=1)
        layers: list[nn.Module] = []
        for _ in range(LAYERS):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        return nn.Sequential(*layers)

    blocks = [block().train(recorded) for _ in range(m)]
    channels = {"spatial": width, "recorded": width, "stem": COLOURS}.get(kind, m * width)
    x = torch.randn(BATCH, channels, size, size)
    wide = x.contiguous(memory_format=torch.channels_last)
    if kind in POOLS:
        # Alone it would be timed with copies that no chain has: as it is met in each way.
        own, pool = x[:, :width], blocks[0]
        own = own.contiguous(memory_format=torch.channels_last)
        return {
            "grouped": lambda: pool(wide),
            "separate": lambda: [pool(own) for _ in range(m)],
            "direct": lambda: halved(x) if kind == "halve" else pool(x),
        }, setting.amount
    ways: dict[str, Callable[[], object]] = {}
    for lowering in LOWERINGS:
        if recorded and lowering == "direct":
            continue
        fused = FusedBlocks(blocks, lowering=lowering)
        ways[lowering] = _step(fused, x) if recorded else _forward(fused, wide if last else x)
    if kind == "stem":
        # Each branch's map gone before the next, as in a chain, and without the concatenation behind it.
        folded = FusedBlocks(blocks)._folded
        for held in folded.weights.values():
            held.refresh()
        ways["separate"] = _plain(lambda: [folded._branch(branch, wide).numel() for branch in range(m)])
    return ways, setting.amount * (LAYERS if kind in ("spatial", "recorded") else 1)


def _forward(fused: nn.Module, x: Tensor) -> Callable[[], object]:
    return _plain(lambda: fused(x))


def _plain(compute: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return compute()

    return run


def _step(fused: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: fused(x).sum().backward()


def measure(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    best = dict.fromkeys(ways, float("inf"))
    for run in ways.values():
        run()
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.thread_time()
            run()
            best[name] = min(best[name], time.thread_time() - start)
    return best


def foreign(table: Path, checkout: Path) -> str:
    """Why ``--write`` must not change ``table``, or ""."""
    if table == checkout / "fedkern" / "ops" / table.name:
        return ""
    return (
        f"--write would change {table}, which is not in the checkout {checkout}: run it there with PYTHONPATH=., or "
        "after pip install -e ."
    )


def write(rows: Iterable[Row], table: Path) -> None:
    """Replaces the rows in the table's file, all or nothing."""
    head, begin, rest = table.read_text().partition("ROWS: tuple[Row, ...] = (\n")
    _, end, tail = rest.partition("\n)\n")
    lines = "\n".join(
        f"    Row({', '.join(repr(value) for value in row)})," for row in sorted(rows, key=lambda row: row[:5])
    )
    partial = table.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(head + begin + lines.replace("'", '"') + end + tail)
    partial.replace(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the table's rows of the kinds measured")
    parser.add_argument("--only", choices=KINDS, action="append", help="measure rows of this kind, given once or more")
    parser.add_argument("--branches", type=int, choices=BRANCHES, help="measure and replace rows of so many branches")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    refusal = foreign(TABLE, CHECKOUT)
    if options.write and refusal:
        parser.error(refusal)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kinds = options.only or KINDS
    asked = [s for s in settings() if s.kind in kinds and options.branches in (None, s.branches)]
    rows = {row[:5]: row for row in fuse_table.ROWS}
    for setting in asked:
        ways, amount = runs(setting)
        costs = {name: 1e12 * seconds / amount for name, seconds in measure(ways, options.repeats).items()}
        rounded = [round(costs[name], 2) if name in costs else None for name in LOWERINGS]
        rows[tuple(setting)] = Row(*setting, *rounded)  # type: ignore[arg-type]
        print(rows[tuple(setting)], flush=True)
        if options.write:
            write(rows.values(), TABLE)
    if options.write:
        kinds_measured = {(s.kind, s.branches) for s in asked}
        kept = [row for key, row in rows.items() if key in asked or (row.kind, row.branches) not in kinds_measured]
        write(kept, TABLE)
        print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
