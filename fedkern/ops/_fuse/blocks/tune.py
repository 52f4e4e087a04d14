"""Measures the costs of FusedBlocks' lowerings on this machine: rows of a ``table.Table``."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedkern.ops._core.processor import processor
from fedkern.ops._fuse.blocks.choice import active_isa
from fedkern.ops._fuse.blocks.fused_blocks import FusedBlocks
from fedkern.ops._fuse.blocks.lowering import halved
from fedkern.ops._fuse.blocks.lowering_costs import KINDS, LOWERINGS, Row, Table

BATCH = 64
COLOURS = 3
LAYERS = 3  # of a chain, so that the work at a block's ends counts for little
BRANCHES, WIDTHS, SIZES = (5, 10), (14, 16, 20, 29, 32, 40, 64, 128), (32, 16, 8, 4, 2)
# Multiplications of one layer for a batch, which limit memory and time.  Costs do not change any more beyond them.
LEAST, MOST = 1 << 22, 3 << 30
POOLS = ("halve", "pool")
REPEATS = 5
# Settings of a quick table, measured in seconds: widths of whole vectors and others.
QUICK_WIDTHS, QUICK_SIZES, QUICK_MOST, QUICK_REPEATS = (14, 16, 20, 64), (16, 8), 1 << 28, 2


class Setting(NamedTuple):
    """What one row measures; the fields are the row's."""

    kind: str
    branches: int
    width: int
    size: int
    channels_last: bool

    @property
    def amount(self) -> float:
        """Multiplications (for a pool: values read) of a layer for a batch."""
        m, width = self.branches, self.width
        times = {"halve": 1, "pool": 1, "pointwise": m * width, "stem": 9 * COLOURS}.get(self.kind, 9 * width)
        return float(BATCH * m * width * self.size**2 * times)


def settings(quick: bool = False) -> list[Setting]:
    """Settings of a table's rows, which take a minute or two; ``quick``: a selection that takes seconds."""
    return [setting for setting in _settings() if not quick or _quick(setting)]


def _settings() -> Iterator[Setting]:
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


def _quick(setting: Setting) -> bool:
    there = setting.branches == BRANCHES[0] and setting.width in QUICK_WIDTHS and setting.size in QUICK_SIZES
    return there and setting.amount <= QUICK_MOST


def measure(asked: Sequence[Setting], threads: int, repeats: int = REPEATS) -> Iterator[Row]:
    """Measures one row after another, its lowerings in turn; the fastest of the repetitions counts.

    On one thread the clock is the thread's own CPU time, which does not suffer from a busy machine.  On several threads
    it is the wall clock, which needs an idle machine.

    Args:
        asked: the settings to measure.
        threads: CPU threads; the caller's number is restored after every row.
        repeats: repetitions of every lowering.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    for setting in asked:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                ways, amount = _ways(setting)
            seconds = _fastest(ways, repeats, clock)
        finally:
            torch.set_num_threads(before)
        costs = {name: round(1e12 * value / amount, 2) for name, value in seconds.items()}
        yield Row(*setting, costs["grouped"], costs["separate"], costs.get("direct"))


def table(rows: Mapping[int, Sequence[Row]]) -> Table:
    """The table of this machine, from the rows of :func:`measure` by number of threads."""
    here = processor()
    return Table(
        vendor=here.vendor,
        family=max(here.family, 0),
        models=((max(here.model, 0),) * 2,),
        name=here.name,
        isa=active_isa(),
        torch=torch.__version__,
        measured=datetime.datetime.now(datetime.UTC).date().isoformat(),
        rows={threads: tuple(each) for threads, each in rows.items()},
    )


def _ways(setting: Setting) -> tuple[dict[str, Callable[[], object]], float]:
    """The lowerings as functions by name, and the amount (:attr:`Setting.amount`) of one run."""
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
        # The pool itself, on the layout that it gets from each lowering: a block of one pool adds copies no chain has.
        own, pool = x[:, :width], blocks[0]
        own = own.contiguous(memory_format=torch.channels_last)
        return {
            "grouped": lambda: pool(wide),
            "separate": lambda: [pool(own) for _ in range(m)],
            "direct": lambda: halved(x) if kind == "halve" else pool(x),
        }, setting.amount
    ways: dict[str, Callable[[], object]] = {}
    for lowering in LOWERINGS:
        if lowering == "direct" and (recorded or active_isa() == "none"):
            continue
        fused = FusedBlocks(blocks, lowering=lowering)  # type: ignore[arg-type]
        ways[lowering] = _step(fused, x) if recorded else _forward(fused, wide if last else x)
    if kind == "stem":
        # As in a chain: each branch's map is freed before the next branch, and no concatenation follows.
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


def _fastest(ways: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    best = dict.fromkeys(ways, float("inf"))
    for run in ways.values():
        run()
    for _ in range(repeats):
        for name, run in ways.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
    return best
