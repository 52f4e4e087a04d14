"""What every benchmark shares: interleaved contestants, medians of per-pair ratios, model bytes, a copy.

A benchmark is a pytest function that calls :func:`compare` with its contestants.  Times on a shared machine drift by
more than the differences looked for, so the contestants take turns within every pair, each starts a pair equally
often, and a speed-up is the median of the pairs' ratios, never a ratio of two medians.  A copy of as many bytes as the
operator must move runs among them: "% of copy" says how far a memory-bound kernel is from the machine's limit.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
SAMPLE_SECONDS = 2e-3  # a timing sample repeats a shorter call until it lasts about this long
MAX_PAIR_SECONDS = 20.0


@dataclass
class Comparison:
    """One row of a benchmark's table.

    Attributes:
        group: operator, for example ``"kl_div"``.
        case: shape and setting.
        ours: which contestant is judged.
        seconds: median time of one call, by contestant.
        speedup: median over pairs of (other's time / our time), by contestant.
        scatter: interquartile range over median of each contestant's own times; a gate skips what scatters too much.
        floors: speed-ups that the project promises, by contestant.
        model_bytes: bytes the operator must move at least.
        copy_seconds: median time of copying ``model_bytes`` (half read, half written) in the same run, if asked for.
        note: what a reader must know, for example which path serves this size.
    """

    group: str
    case: str
    ours: str
    threads: int
    loaded: bool
    pairs: int
    seconds: dict[str, float]
    speedup: dict[str, float]
    scatter: dict[str, float]
    floors: dict[str, float] = field(default_factory=dict)
    model_bytes: int = 0
    copy_seconds: float | None = None
    note: str = ""

    @property
    def bandwidth(self) -> float:
        """Model bytes over our time, in GB/s."""
        return self.model_bytes / self.seconds[self.ours] / 1e9

    @property
    def copy_fraction(self) -> float | None:
        """Our bandwidth over the copy's."""
        return None if self.copy_seconds is None else self.copy_seconds / self.seconds[self.ours]

    def record(self) -> dict[str, Any]:
        """Everything above as plain JSON values."""
        return {**asdict(self), "bandwidth_gb_per_s": self.bandwidth, "copy_fraction": self.copy_fraction}


def compare(
    benchmark: Any,
    group: str,
    case: str,
    contestants: dict[str, Callable[[], Any]],
    *,
    ours: str = "fedkern",
    model_bytes: int = 0,
    copy: bool = False,
    floors: dict[str, float] | None = None,
    pairs: int = 21,
    threads: int | None = None,
    loaded: bool = False,
    note: str = "",
) -> Comparison:
    """Times the contestants against each other and leaves the result in pytest-benchmark's record.

    Args:
        benchmark: pytest-benchmark's fixture.
        contestants: callables without arguments; the first call of each (compilation, page faults) is not timed.
        copy: also time a copy of ``model_bytes``.
        threads: torch threads for all contestants; None leaves torch's default.
        loaded: keep another process spinning meanwhile, as on a shared machine.
    """
    runs = dict(contestants)
    if copy:
        count = max(model_bytes // 8, 1)
        source, target = torch.ones(count), torch.ones(count)
        runs["copy"] = lambda: target.copy_(source)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with _load() if loaded else contextlib.nullcontext():
            samples = _interleave(runs, pairs)
            used = torch.get_num_threads()
            _leave_record(benchmark, contestants[ours])
    finally:
        torch.set_num_threads(before)
    copy_samples = samples.pop("copy", None)
    own = samples[ours]
    result = Comparison(
        group=group,
        case=case,
        ours=ours,
        threads=used,
        loaded=loaded,
        pairs=len(own),
        seconds={name: statistics.median(values) for name, values in samples.items()},
        speedup={
            name: statistics.median(a / b for a, b in zip(values, own, strict=True))
            for name, values in samples.items()
            if name != ours
        },
        scatter={name: _scatter(values) for name, values in samples.items()},
        floors=floors or {},
        model_bytes=model_bytes,
        copy_seconds=statistics.median(copy_samples) if copy_samples else None,
        note=note,
    )
    benchmark.group = group
    benchmark.extra_info.update(result.record())
    COMPARISONS.append(result)
    return result


COMPARISONS: list[Comparison] = []


def _interleave(runs: dict[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    repeats = {}
    for name, run in runs.items():
        run()
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, round(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    begin = time.perf_counter()
    for pair in range(pairs):
        turn = pair % len(names)
        for name in names[turn:] + names[:turn]:
            run, count = runs[name], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                run()
            samples[name].append((time.perf_counter() - start) / count)
        if pair >= 14 and time.perf_counter() - begin > MAX_PAIR_SECONDS:
            break
    return samples


def _scatter(values: list[float]) -> float:
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def _leave_record(benchmark: Any, run: Callable[[], Any]) -> None:
    start = time.perf_counter()
    run()
    seconds = max(time.perf_counter() - start, 1e-7)
    benchmark.pedantic(run, rounds=5, iterations=max(1, round(SAMPLE_SECONDS / seconds)), warmup_rounds=1)


def _spin() -> None:
    value = 1.0
    while True:
        value = value * 1.0000001 + 1e-9


@contextlib.contextmanager
def _load() -> Iterator[None]:
    """One other process that never sleeps."""
    process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    time.sleep(0.3)
    try:
        yield
    finally:
        process.kill()
        process.join()


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    info: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        from fedkern.ops.backend import cpu_core

        info["isa"] = cpu_core().isa()
    except Exception as error:  # the table says so instead of failing
        info["isa"] = f"no core: {error}"
    return info


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as text: time, speed-ups with the promised floor, GB/s, % of copy."""
    lines = []
    for c in comparisons:
        against = ", ".join(
            f"{ratio:.2f}× {name}" + (f" (promised {c.floors[name]:g}×)" if name in c.floors else "")
            for name, ratio in c.speedup.items()
        )
        where = f"{c.threads} thread{'s' if c.threads > 1 else ''}{', loaded' if c.loaded else ''}"
        memory = f", {c.bandwidth:.1f} GB/s" if c.model_bytes else ""
        if c.copy_fraction is not None:
            memory += f", {100 * c.copy_fraction:.0f} % of copy"
        note = f"  [{c.note}]" if c.note else ""
        lines.append(f"{c.group} {c.case} ({where}): {1e6 * c.seconds[c.ours]:.1f} µs: {against}{memory}{note}")
    return "\n".join(lines)


def write_results(comparisons: list[Comparison], folder: Path = RESULTS) -> list[Path]:
    """Writes ``<group>.json`` for every group, each replaced as a whole."""
    folder.mkdir(exist_ok=True)
    paths = []
    for group in sorted({c.group for c in comparisons}):
        path = folder / f"{group}.json"
        content = {"machine": machine(), "results": [c.record() for c in comparisons if c.group == group]}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        partial.replace(path)
        paths.append(path)
    return paths
