"""Measures FusedBlocks' lowerings and writes the table they are chosen from, ``fedkern/ops/fuse_table.py``.

    python benchmarks/tune_fuse.py [--write] [--only KIND]

Each setting is timed on one thread, the lowerings in turn, in seconds of the thread's own processor time (a busy
machine takes turns away from all alike); the fastest of the repetitions counts.  About ten minutes; run it on the
machine that the table is meant for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fedkern.models.resnet import BasicBlock
from fedkern.ops import FusedBlocks, fuse_table
from fedkern.ops.fuse_table import LOWERINGS, Row

BATCH = 64
TABLE = Path(fuse_table.__file__)
MOST = 640 * 32**2  # elements of a sample that adaptors read: memory, and minutes
BRANCHES, WIDTHS, SIZES = (5, 10, 20), (14, 20, 29, 64), (16, 32)


def settings() -> Iterator[tuple[str, int, int, int, bool]]:
    """(kind, M, width, size, channels-last input)."""
    for m in BRANCHES:
        for width in WIDTHS:
            for size in SIZES:
                yield "spatial", m, width, size, False
                for last in (False, True):
                    if m * width * size**2 <= MOST:
                        yield "pointwise", m, width, size, last
    for m in (5, 10):
        for width in (20, 64):
            yield "recorded", m, width, 16, False


def runs(kind: str, m: int, width: int, size: int, last: bool) -> dict[str, Callable[[], object]]:
    channels = m * width if kind == "pointwise" else width
    blocks = [nn.Conv2d(channels, width, 1) if kind == "pointwise" else BasicBlock(width, width) for _ in range(m)]
    x = torch.randn(BATCH, channels, size, size)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    ways: dict[str, Callable[[], object]] = {}
    for lowering in LOWERINGS:
        if kind == "recorded" and lowering == "direct":
            continue
        fused = FusedBlocks(blocks, lowering=lowering).train(kind == "recorded")
        ways[lowering] = _step(fused, x) if kind == "recorded" else _forward(fused, x)
    return ways


def _forward(fused: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            fused(x)

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the table's rows")
    parser.add_argument("--only", choices=("spatial", "pointwise", "recorded"), help="measure rows of one kind")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row for row in fuse_table.ROWS if options.only and row.kind != options.only]
    for kind, m, width, size, last in settings():
        if options.only in (None, kind):
            times = measure(runs(kind, m, width, size, last), options.repeats)
            rows.append(Row(kind, m, width, size, last, min(times, key=lambda name: times[name])))
            told = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items())
            print(f"{kind} M={m} width={width} {size}x{size} channels_last={last}: {told}", flush=True)
    if options.write:
        text = TABLE.read_text()
        head, begin, rest = text.partition("ROWS: tuple[Row, ...] = (\n")
        _, end, tail = rest.partition("\n)\n")
        lines = "\n".join(f"    Row({', '.join(repr(value) for value in row)})," for row in sorted(rows))
        TABLE.write_text(head + begin + lines.replace("'", '"') + end + tail)
        print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
