"""Harness of all benchmarks: interleaved implementations, medians of per-pair ratios, model bytes, a copy.

A benchmark is a pytest function that calls :func:`compare` with its implementations.  Times on a shared machine drift
by more than the differences looked for, so the implementations take turns: a "pair" is one sample of each, the one that
starts changes from pair to pair, and a speed-up is the median of the pairs' ratios (theirs over ours), never a ratio of
two medians.  Where a benchmark asks for it, a copy of as many bytes as the operator must move runs among them: "% of
copy" says how far a memory-bound kernel is from the machine's limit.  The gate (gate.py says when it fails) measures
ours and a baseline, one thread in the thread's own processor time; a recording measures all of them in wall time.

The same files measure a GPU with ``--device cuda``: tensors that a benchmark makes without naming a device are made
there.  While the implementations run that default is lifted (it would put a dispatch mode between them and their
kernels).
"""

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gate, machines, peak_memory, shown, sources, timing
from benchmarks.baselines import Absent
from benchmarks.comparisons import Comparison, Recorder, machine_difference

HERE = Path(__file__).parent
MAX_SECONDS = 20.0  # of a measurement, after which it ends once it has LEAST_PAIRS pairs
SHORT_SECONDS = 1.0  # the same for the gate
LEAST_PAIRS = 15
GPU_PAIRS = 7  # events on a GPU scatter less than a clock


@dataclass
class Settings:
    """Settings of this run, which conftest.py fills in from the command line.

    Attributes:
        device: where tensors are made.
        floors: the floors that measurements must reach, or None.
        afresh: the options of a fresh process that measures a row below its floor again, none in that process.
        seen: the floors that this run finds, or None where it does not look for any.
        recorder: the recorder of rows where they are recorded, or None.
        rounds: whether bench_rounds.py plays its rounds: "", "small" (a trial) or "full".
        environments: folders of virtual environments, by the framework that each one has.
        data_root: folder of CIFAR-10's binary files, or None.
    """

    device: str = "cpu"
    floors: gate.Floors | None = None
    afresh: list[str] = field(default_factory=list)
    seen: gate.Floors | None = None
    recorder: Recorder | None = None
    rounds: str = ""
    environments: dict[str, Path] = field(default_factory=dict)
    data_root: Path | None = None
    benchmark: Any = None


SETTINGS = Settings()
COMPARISONS: list[Comparison] = []
GATED: list[str] = []


def device() -> torch.device:
    """Return the device of this run's tensors."""
    return torch.device(SETTINGS.device)


def train_step(loss: Callable[..., Tensor], leaves: list[Tensor], *others: Any) -> Callable[[], None]:
    """Return a call that computes a loss and the gradients of its leaves."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves, *others).backward()

    return step


def contest(
    ours: Callable[..., Tensor], eager: Callable[..., Tensor], leaves: list[Tensor], *others: Any
) -> dict[str, Callable[[], None]]:
    """Return training steps of a loss: ours, eager and compiled."""
    return {
        "fedkern": train_step(ours, leaves, *others),
        "eager": train_step(eager, leaves, *others),
        "compile": train_step(torch.compile(eager, dynamic=False), leaves, *others),
    }


def compare(
    node: str,
    group: str,
    case: str,
    implementations: dict[str, Callable[[], Any] | Absent],
    *,
    ours: str = "fedkern",
    model_bytes: int = 0,
    copy: bool = False,
    pairs: int = 21,
    threads: int = 1,
    note: str = "",
) -> None:
    """Time the implementations against each other.

    Args:
        node: the pytest node that measures, relative to benchmarks/.
        implementations: callables without arguments, or why one cannot run here; the first calls of each (compilation,
            page faults) are not timed.
        copy: also time a copy of ``model_bytes``.
        threads: torch threads for all implementations.

    Under ``--gate-short`` the test fails where the row's ratio stays below its floor when measured again, and is
    skipped, with the reason, where that cannot be told.  Under ``--record`` the row is written at once; the test fails
    before measuring where its file must not take it.
    """
    where = device()
    if where.type != "cpu" and threads > 1:
        pytest.skip("threads are the CPU's")
    refusal = SETTINGS.recorder.refusal(group, where.type) if SETTINGS.recorder else ""
    if refusal:
        pytest.fail(refusal, pytrace=False)
    runs = {name: run for name, run in implementations.items() if not isinstance(run, Absent)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if "torch._dynamo" in sys.modules:
        # Past its limit of shapes per function torch.compile runs it eagerly, and does not say so.
        torch._dynamo.reset()
    try:
        with _plain_defaults():
            if copy and (SETTINGS.floors or SETTINGS.seen):
                runs[shown.COPY] = _copy(model_bytes, where)
            _leave_record(runs[ours], where)
            if SETTINGS.floors is not None:
                _hold(node, SETTINGS.floors, runs, ours, threads)
                return
            if SETTINGS.seen is not None:
                _look(node, SETTINGS.seen, runs, ours, threads)
                return
            pairs = min(pairs, GPU_PAIRS) if where.type == "cuda" else pairs
            result = _measure(runs, ours, pairs, model_bytes if copy else 0, where)
            peak = {name: peak_memory.peak_bytes(run, where) for name, run in runs.items()}
    finally:
        torch.set_num_threads(before)
    served_by, core = machines.served_by(where.type)
    conclude(
        Comparison(
            group=group,
            case=case,
            ours=ours,
            threads=threads,
            **result,
            model_bytes=model_bytes,
            note=note,
            device=where.type,
            test=node,
            peak_bytes={name: rise for name, rise in peak.items() if rise is not None},
            missing={name: run.reason for name, run in implementations.items() if isinstance(run, Absent)},
            time=machines.now(),
            sources=sources.behind(served_by, core, group),
            backend=served_by,
        )
    )


def conclude(comparison: Comparison) -> None:
    """Show and record a measured row."""
    COMPARISONS.append(comparison)
    if SETTINGS.recorder:
        SETTINGS.recorder.add(comparison)


def _hold(node: str, floors: gate.Floors, runs: dict[str, Callable[[], Any]], ours: str, threads: int) -> None:
    """Fail where the row stays below its floor, and skip where the measurement cannot tell."""
    if difference := machine_difference(floors.machine, machine()):
        pytest.skip(f"floors.toml was {difference}")
    if threads > gate.usable_cpus():
        pytest.skip(f"recorded with {threads} threads, but this process may use {gate.usable_cpus()}")
    floor = floors.rows[node]
    for attempt in range(gate.ATTEMPTS):
        time.sleep(attempt * gate.PAUSE)
        duel = _duel(runs, ours, floor.against, threads)
        verdict = gate.judge(floor, duel)
        if verdict.outcome == "pass":
            break
    if SETTINGS.afresh:
        verdict = _afresh(node, verdict)
    GATED.append(f"{node}: {duel.ratio:.3g}× {floor.against}, at least {floor.lowest:.3g}×")
    if verdict.outcome == "fail":
        pytest.fail(f"{node}: {verdict.reason}", pytrace=False)
    if verdict.outcome == "skip":
        pytest.skip(verdict.reason)


def _afresh(node: str, verdict: gate.Verdict) -> gate.Verdict:
    """Return the measurements of this process and, where it finds a row too slow, of fresh ones."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *SETTINGS.afresh, str(HERE / node)]
    verdicts = [verdict]
    while verdicts[-1].outcome != "pass" and len(verdicts) < gate.PROCESSES:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        outcome = "fail" if answer.returncode else "pass" if " passed" in answer.stdout else "skip"
        verdicts.append(gate.Verdict(outcome, verdict.reason))
    return gate.joint(verdicts)


def _look(node: str, seen: gate.Floors, runs: dict[str, Callable[[], Any]], ours: str, threads: int) -> None:
    """Note the row's ratio beside those of earlier runs that set floors, and skip rows that the gate cannot hold.

    A run's ratio is the median of as many measurements as the gate makes.
    """
    case = next(case for name, case, _ in shown.nodes() if name == node)
    against = case.held or case.against
    clock = timing.clock(device(), one_thread=threads == 1)
    cost = min(sum(clock.sample(runs[name], 1) for name in (ours, against)) for _ in range(3))
    if cost > gate.LONGEST:
        pytest.skip(f"a call of both takes {cost:.2f} s, too long for the gate")
    duels = [_duel(runs, ours, against, threads) for _ in range(gate.ATTEMPTS)]
    if threads > 1 and (busy := max(duel.busy for duel in duels)) > gate.BUSY:
        pytest.skip(f"others took {100 * busy:.0f} % of the processors")
    if min(duel.scatter for duel in duels) > gate.NOISY:
        pytest.skip("times scatter too much for a floor")
    ratio, seconds = (statistics.median(getattr(duel, fact) for duel in duels) for fact in ("ratio", "seconds"))
    seen.rows[node] = gate.Floor(against, (ratio,), (seconds,)).after(seen.rows.get(node))
    GATED.append(f"{node}: {ratio:.3g}× {against}")


def _duel(runs: dict[str, Callable[[], Any]], ours: str, against: str, threads: int) -> gate.Duel:
    """Take one measurement of the gate."""
    clock = timing.clock(device(), one_thread=threads == 1)
    beside = gate.Others()
    samples, _ = timing.interleave(
        {name: runs[name] for name in (ours, against)}, LEAST_PAIRS, clock, longest=SHORT_SECONDS, fewest=LEAST_PAIRS
    )
    measured, ratios = summarise(samples, ours)
    scatter = max(measured["scatter"].values())
    return gate.Duel(ratios[against], measured["seconds"][against], scatter, beside.share())


def _measure(
    runs: dict[str, Callable[[], Any]], ours: str, pairs: int, copied: int, where: torch.device
) -> dict[str, Any]:
    """Return the measured attributes of a :class:`Comparison`."""
    if copied:
        runs = {**runs, shown.COPY: _copy(copied, where)}
    clock = timing.clock(where)
    samples, walls = timing.interleave(runs, pairs, clock, longest=MAX_SECONDS, fewest=min(pairs, LEAST_PAIRS))
    copies = samples.pop(shown.COPY, None)
    measured, _ = summarise(samples, ours)
    return measured | {
        "copy_seconds": statistics.median(copies) if copies else None,
        "wall_seconds": {n: statistics.median(values) for n, values in walls.items() if values and n != shown.COPY},
    }


def _copy(moved: int, where: torch.device) -> Callable[[], Any]:
    """Return a call that reads half of so many bytes and writes the other half."""
    count = max(moved // 8, 1)
    source, target = torch.ones(count, device=where), torch.ones(count, device=where)
    return lambda: target.copy_(source)


def summarise(samples: dict[str, list[float]], ours: str) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return attributes of a :class:`Comparison` from the implementations' times, and the pairs' ratios.

    Args:
        samples: seconds by implementation, each time beside those that it was measured among.
    """
    base = samples[ours]
    ratios = {
        name: [a / b for a, b in zip(values, base, strict=True)] for name, values in samples.items() if name != ours
    }
    measured = {
        "pairs": len(base),
        "seconds": {name: statistics.median(values) for name, values in samples.items()},
        "speedup": {name: statistics.median(values) for name, values in ratios.items()},
        "scatter": {name: timing.scatter(values) for name, values in samples.items()},
    }
    return measured, ratios


def _leave_record(run: Callable[[], Any], where: torch.device) -> None:
    """Leave a few wall times for pytest-benchmark's own table and files."""
    clock = timing.clock(where)
    seconds = clock.wall(run, 1) or clock.sample(run, 1)
    call = run
    if where.type == "cuda":

        def call() -> None:
            run()
            torch.cuda.synchronize(where)

    rounds = 5 if SETTINGS.floors is None and SETTINGS.seen is None else 1
    iterations = max(1, round(timing.SAMPLE_SECONDS / max(seconds, 1e-7)))
    SETTINGS.benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)


@contextlib.contextmanager
def _plain_defaults() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(None)
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


def machine() -> dict[str, Any]:
    """Return the machine and versions behind this run's numbers."""
    return machines.machine(SETTINGS.device)


def table(comparisons: list[Comparison]) -> str:
    """Return the comparisons as text: time, speed-ups, GB/s, % of copy."""
    lines = []
    for c in comparisons:
        against = ", ".join(f"{ratio:.2f}× {name}" for name, ratio in c.speedup.items())
        memory = f", {c.bandwidth:.1f} GB/s" if c.model_bytes else ""
        if c.copy_fraction is not None:
            memory += f", {100 * c.copy_fraction:.0f} % of copy"
        if c.ours in c.peak_bytes:
            memory += f", {c.peak_bytes[c.ours] / 1e6:.1f} MB at most"
        note = f"  [{c.note}]" if c.note else ""
        absent = "".join(f"  [no {name}: {reason}]" for name, reason in c.missing.items())
        lines.append(
            f"{c.group} {c.case} ({c.where}): {1e6 * c.seconds[c.ours]:.1f} µs: {against}{memory}{note}{absent}"
        )
    return "\n".join(lines)
