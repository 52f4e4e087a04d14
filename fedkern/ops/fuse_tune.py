"""Measures what FusedBlocks' lowerings cost on this machine: the rows of a :class:`~fedkern.ops.fuse_table.Table`."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedkern.ops.fuse_blocks import FusedBlocks
from fedkern.ops.fuse_choice import active_isa
from fedkern.ops.fuse_lowering import halved
from fedkern.ops.fuse_table import KINDS, LOWERINGS, Row, Table
from fedkern.ops.processor import processor

BATCH = 64
COLOURS = 3
LAYERS = 3  # of a chain: what blocks do at their ends shall not count for much
BRANCHES, WIDTHS, SIZES = (5, 10), (14, 16, 20, 29, 32, 40, 64, 128), (32, 16, 8, 4, 2)
# Of one layer's multiplications for a batch: memory, and minutes.  Beyond them costs change no more.
LEAST, MOST = 1 << 22, 3 << 30
POOLS = ("halve", "pool")
REPEATS = 5
# What a quick table has: rows of whole vectors and others, in seconds.
QUICK_WIDTHS, QUICK_SIZES, QUICK_MOST, QUICK_REPEATS = (14, 16, 20, 64), (16, 8), 1 << 28, 2


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


def settings(quick: bool = False) -> list[Setting]:
    """What a table's rows are measured for, at most a minute or two of them; ``quick``: some, in seconds."""
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
    """Measures one row after another, the lowerings of each in turn; the fastest of the repetitions counts.

    On one thread the thread's own processor time counts, of which a busy machine takes nothing; on more of them the
    wall clock, which wants an idle machine.

    Args:
        asked: what to measure.
        threads: CPU threads; the caller's number is restored behind every row.
        repeats: of every lowering.
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
    """A table of rows that :func:`measure` has found on this machine, by the number of threads."""
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
        if lowering == "direct" and (recorded or active_isa() == "none"):
            continue
        fused = FusedBlocks(blocks, lowering=lowering)  # type: ignore[arg-type]
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
