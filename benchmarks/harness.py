"""What every benchmark shares: interleaved contestants, medians of per-pair ratios, model bytes, a copy.

A benchmark is a pytest function that calls :func:`compare` with its contestants.  Times on a shared machine drift by
more than the differences looked for, so the contestants take turns: a "pair" is one sample of each, the one that starts
changes from pair to pair, and a speed-up is the median of the pairs' ratios (theirs over ours), never a ratio of two
medians.  Where a benchmark asks for it, a copy of as many bytes as the operator must move runs among them: "% of copy"
says how far a memory-bound kernel is from the machine's limit.  A gate (gate.py says when it fails) times one thread in
the thread's own processor time, a recording in wall time; the short gate has no copy, no compiled contestants and no
peak memory.

The same files measure a GPU with ``--device cuda``: tensors that a benchmark makes without naming a device are made
there.  While the contestants run that default is lifted (it would put a dispatch mode between them and their kernels).
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gate
import machines
import peak_memory
import pytest
import sources
import timing
import torch
from comparisons import COPY, Comparison, Recorder, machine_difference
from contestants import Absent

from fedkern.ops._core import backend

MAX_SECONDS = 20.0  # of a measurement, after which it ends once it has LEAST_PAIRS pairs
SHORT_SECONDS = 1.0  # the same in the short gate
LEAST_PAIRS = 15
ATTEMPTS = 2  # measurements in a row that must lie below a floor
SHORT_ATTEMPTS = 4  # the same in the short gate, which runs where others compute, for shorter


@dataclass
class Settings:
    """How this run measures; conftest.py fills it in from the command line.

    Attributes:
        device: where tensors are made.
        floors: what a measurement must not fall below, or None.
        short: measure only briefly, without the contestants that must be compiled first.
        recorder: what takes the rows where they are recorded, or None.
        rounds: whether bench_rounds.py plays its rounds: "", "small" (a trial) or "full".
        environments: folders of virtual environments, by the framework that each one has.
        data_root: folder of CIFAR-10's binary files, or None.
    """

    device: str = "cpu"
    floors: gate.Floors | None = None
    short: bool = False
    recorder: Recorder | None = None
    rounds: str = ""
    environments: dict[str, Path] = field(default_factory=dict)
    data_root: Path | None = None


SETTINGS = Settings()
COMPARISONS: list[Comparison] = []


def device() -> torch.device:
    """Where this run's tensors live."""
    return torch.device(SETTINGS.device)


def compare(
    benchmark: Any,
    group: str,
    case: str,
    contestants: dict[str, Callable[[], Any] | Absent],
    *,
    ours: str = "fedkern",
    model_bytes: int = 0,
    copy: bool = False,
    floors: dict[str, float] | None = None,
    gpu_floors: dict[str, float] | None = None,
    pairs: int = 21,
    threads: int | None = None,
    loaded: bool = False,
    over: str | None = None,
    at_most: float | None = None,
    beside: Collection[str] = (),
    note: str = "",
) -> Comparison:
    """Times the contestants against each other and leaves the result in pytest-benchmark's record.

    Args:
        benchmark: pytest-benchmark's fixture.
        contestants: callables without arguments, or why one cannot run here; the first calls of each (compilation,
            page faults) are not timed.
        copy: also time a copy of ``model_bytes``.
        floors, gpu_floors: speed-ups that the project promises, on the CPU and on a GPU; over ``comparisons.COPY`` a
            share of its bytes/s, promised on a GPU wherever ``copy`` is asked for and the bytes do not fit the L2.
        threads: torch threads for all contestants; None leaves torch's default.
        loaded: keep another process spinning meanwhile, as on a shared machine.
        over: record the overhead, our time over this contestant's (``""``: all of ours), as a median over pairs.
        at_most: the overhead in seconds that the project promises.
        beside: contestants that are shown but get no floor, such as operators of ours: they may become faster.

    Under ``--gate`` the test fails where a ratio stays below its floor when measured again, and is skipped, with the
    reason, where that cannot be told.  Under ``--record`` the row is written at once; the test fails before measuring
    where its file must not take it.
    """
    where = device()
    if where.type != "cpu" and (loaded or (threads or 1) > 1):
        pytest.skip("threads and load are the CPU's")
    refusal = SETTINGS.recorder.refusal(group, where.type) if SETTINGS.recorder else ""
    if refusal:
        pytest.fail(refusal, pytrace=False)
    before = torch.get_num_threads()
    used = (threads or before) if where.type == "cpu" else 1
    floor = floor_here((group, case, where.type, used, loaded))
    runs = {name: run for name, run in contestants.items() if not isinstance(run, Absent)}
    if SETTINGS.short:
        runs = {name: run for name, run in runs.items() if not gate.slow(name)}
    if "torch._dynamo" in sys.modules:
        # Past its limit of shapes per function torch.compile runs it eagerly, and says so to nobody here.
        torch._dynamo.reset()
    torch.set_num_threads(used)
    try:
        with _plain_defaults(), timing.load() if loaded else contextlib.nullcontext():
            for left in reversed(range(SHORT_ATTEMPTS if SETTINGS.short else ATTEMPTS)):
                result, ratios = _measure(
                    runs, ours, over, pairs, model_bytes if copy and not SETTINGS.short else 0, where
                )
                slack = gate.SHORT_SLACK if SETTINGS.short else 1.0
                verdict = gate.judge(floor, ratios, result["scatter"], ours, slack) if floor else gate.Verdict("pass")
                if verdict.outcome != "fail" or not left:
                    break
            _leave_record(benchmark, runs[ours], where)
            used_operators = operators_of(runs[ours]) if where.type == "cuda" else {}
            peak = {} if SETTINGS.short else {name: peak_memory.peak_bytes(run, where) for name, run in runs.items()}
    finally:
        torch.set_num_threads(before)
    served_by, core = machines.served_by(where.type)
    comparison = Comparison(
        group=group,
        case=case,
        ours=ours,
        threads=used,
        loaded=loaded,
        **result,
        floors=(floors or {}) if where.type == "cpu" else _gpu_floors(gpu_floors, model_bytes if copy else 0, where),
        model_bytes=model_bytes,
        note=note,
        at_most=at_most,
        device=where.type,
        test=benchmark.fullname.rpartition("benchmarks/")[2],
        peak_bytes={name: rise for name, rise in peak.items() if rise is not None},
        missing={name: run.reason for name, run in contestants.items() if isinstance(run, Absent)},
        beside=[name for name in contestants if name in beside],
        time=machines.now(),
        core=core,
        sources=sources.behind(served_by, core, group),
        backend=served_by,
        operators=used_operators,
    )
    benchmark.group = group
    benchmark.extra_info.update(comparison.record())
    conclude(comparison, verdict)
    return comparison


def conclude(comparison: Comparison, verdict: gate.Verdict) -> None:
    """Shows and records a measured row; the test fails or is skipped where the gate says so."""
    COMPARISONS.append(comparison)
    if SETTINGS.recorder:
        SETTINGS.recorder.add(comparison)
    if verdict.outcome == "fail":
        pytest.fail(f"{comparison.group} {comparison.case} ({comparison.where}): {verdict.reason}", pytrace=False)
    if verdict.outcome == "skip":
        pytest.skip(verdict.reason)


def _gpu_floors(floors: dict[str, float] | None, copied: int, where: torch.device) -> dict[str, float]:
    """With what is promised of bandwidth at sizes past twice the L2."""
    bound = copied > 2 * torch.cuda.get_device_properties(where).L2_cache_size
    return {**({COPY: 0.9} if bound else {}), **(floors or {})}


def _measure(
    runs: dict[str, Callable[[], Any]], ours: str, over: str | None, pairs: int, copied: int, where: torch.device
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What of a :class:`Comparison` is measured, and the pairs' ratios by contestant."""
    runs = dict(runs)
    if copied:
        count = max(copied // 8, 1)
        source, target = torch.ones(count, device=where), torch.ones(count, device=where)
        runs["copy"] = lambda: target.copy_(source)
    longest = SHORT_SECONDS if SETTINGS.short else MAX_SECONDS
    # A gate runs where others compute too; what was recorded in peace is the same in processor time.
    clock = timing.clock(where, one_thread=SETTINGS.floors is not None and torch.get_num_threads() == 1)
    samples, walls = timing.interleave(runs, pairs, clock, longest=longest, least=min(pairs, LEAST_PAIRS))
    copies = samples.pop("copy", None)
    own = samples[ours]
    overhead = None
    if over is not None:
        spent = walls if walls[ours] else samples
        less = spent[over] if over else [0.0] * len(own)
        overhead = statistics.median(a - b for a, b in zip(spent[ours], less, strict=True))
    measured, ratios = summarise(samples, ours)
    measured |= {
        "overhead": overhead,
        "copy_seconds": statistics.median(copies) if copies else None,
        "wall_seconds": {n: statistics.median(values) for n, values in walls.items() if values and n != "copy"},
    }
    return measured, ratios


def summarise(samples: dict[str, list[float]], ours: str) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What of a :class:`Comparison` follows from the contestants' times, and the pairs' ratios by contestant.

    Args:
        samples: seconds by contestant, each time beside those that it was measured among.
    """
    own = samples[ours]
    ratios = {
        name: [a / b for a, b in zip(values, own, strict=True)] for name, values in samples.items() if name != ours
    }
    measured = {
        "pairs": len(own),
        "seconds": {name: statistics.median(values) for name, values in samples.items()},
        "speedup": {name: statistics.median(values) for name, values in ratios.items()},
        "spread": {name: statistics.quantiles(values, n=4)[::2] for name, values in ratios.items()},
        "scatter": {name: timing.scatter(values) for name, values in samples.items()},
    }
    return measured, ratios


def operators_of(run: Callable[[], Any]) -> dict[str, int]:
    """What one call asks the choice of a backend for: by operator the bytes of the first tensor, the largest."""
    with backend.observed() as operators:
        run()
    return dict(operators)


def floor_here(key: tuple[str, str, str, int, bool]) -> gate.Floor | None:
    """The row's floor under ``--gate``; skips the test where there is none to hold it against."""
    if SETTINGS.floors is None:
        return None
    floor = SETTINGS.floors.of(key, names_here(SETTINGS.floors))
    if floor is None:
        others = {name: SETTINGS.floors.machines.get(name, {}) for name in SETTINGS.floors.machines_of(key)}
        differences = [f"{name}: {machine_difference(info, machine())}" for name, info in others.items()]
        pytest.skip("; ".join(differences) or "floors.toml has no floor for this row")
    if floor.threads > gate.usable_cpus():
        pytest.skip(f"recorded with {floor.threads} threads, but this process may use {gate.usable_cpus()}")
    return floor


def names_here(floors: gate.Floors) -> set[str]:
    """The machines of floors.toml whose ratios hold on this one."""
    here = machine()
    return {name for name, info in floors.machines.items() if not machine_difference(info, here)}


@contextlib.contextmanager
def _plain_defaults() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(None)
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


def _leave_record(benchmark: Any, run: Callable[[], Any], where: torch.device) -> None:
    """A few wall times for pytest-benchmark's own table."""
    clock = timing.clock(where)
    seconds = clock.wall(run, 1) or clock.sample(run, 1)
    call = run
    if where.type == "cuda":

        def call() -> None:
            run()
            torch.cuda.synchronize(where)

    rounds = 1 if SETTINGS.floors is not None else 5
    iterations = max(1, round(timing.SAMPLE_SECONDS / max(seconds, 1e-7)))
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)


def machine() -> dict[str, Any]:
    """What this run's numbers depend on."""
    return machines.machine(SETTINGS.device)


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as text: time, speed-ups with the promised floor, GB/s, % of copy."""
    lines = []
    for c in comparisons:
        against = ", ".join(
            f"{ratio:.2f}× {name}" + (f" (promised {c.floors[name]:g}×)" if name in c.floors else "")
            for name, ratio in c.speedup.items()
        )
        memory = f", {c.bandwidth:.1f} GB/s" if c.model_bytes else ""
        if c.copy_fraction is not None:
            memory += f", {100 * c.copy_fraction:.0f} % of copy"
        if c.ours in c.peak_bytes:
            memory += f", {c.peak_bytes[c.ours] / 1e6:.1f} MB at most"
        if c.overhead is not None:
            memory += f", overhead {1e6 * c.overhead:.1f} µs"
        note = f"  [{c.note}]" if c.note else ""
        absent = "".join(f"  [no {name}: {reason}]" for name, reason in c.missing.items())
        lines.append(
            f"{c.group} {c.case} ({c.where}): {1e6 * c.seconds[c.ours]:.1f} µs: {against}{memory}{note}{absent}"
        )
    return "\n".join(lines)
