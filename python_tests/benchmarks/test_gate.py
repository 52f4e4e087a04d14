"""Tests of the gate and of the benchmarks' instruments: floors, clocks, turns, peak memory."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import baselines, gate, timing
from benchmarks.comparisons import machine_difference

MACHINE = {"cpu": "A", "cores": 2, "isa": "avx2", "torch": "2.13.0+cpu"}
FLOOR = gate.Floor("eager", (2.0, 2.2), (1.0, 1.1))


@pytest.mark.parametrize(
    ("ratios", "facts", "outcome"),
    [
        ([2.0] * 15, {}, "pass"),
        ([2.0] * 15, {"scatter": 3.0, "busy": 0.9}, "pass"),  # fast enough, whatever else
        ([2.0] * 15, {"seconds": 1.3}, "skip"),  # the baseline is slow today: so may ours be
        ([1.81] * 15, {}, "pass"),
        ([2.2 / 1.3] * 15, {}, "fail"),
        ([2.2 / 1.3] * 15, {"scatter": 0.5}, "skip"),
        ([2.2 / 1.3] * 15, {"busy": 0.5}, "skip"),
        ([2.2 / 1.3] * 15, {"seconds": 0.9}, "fail"),
        ([2.2 / 1.3] * 15, {"seconds": 0.8}, "skip"),
        ([2.2 / 1.3] * 15, {"seconds": 1.3}, "skip"),
        ([1.6] * 7 + [1.85] * 8, {}, "pass"),
        ([1.6] * 8 + [1.85] * 7, {}, "fail"),
    ],
)
def test_verdicts(ratios: list[float], facts: dict[str, float], outcome: str) -> None:
    verdict = gate.judge(FLOOR, gate.Duel(ratios, **{"seconds": 1.0, **facts}))
    assert verdict.outcome == outcome
    where = "above" if ratios[0] > FLOOR.lowest else "below"
    assert (f"eager, {where} 1.8×" in verdict.reason) == (outcome != "pass")


@pytest.mark.parametrize(
    ("outcomes", "joint"),
    [
        (["pass"], "pass"),
        (["fail", "skip", "fail", "pass"], "pass"),
        (["fail"] * 7, "fail"),
        (["skip", "fail", "skip", "fail"], "fail"),
        (["fail", "skip", "skip"], "skip"),
    ],
)
def test_what_processes_say_together(outcomes: list[str], joint: str) -> None:
    assert gate.joint([gate.Verdict(outcome) for outcome in outcomes]).outcome == joint


def test_what_processes_saw_is_joined_and_rows_that_sound_kernels_miss_are_not_held() -> None:
    joined = FLOOR.after(gate.Floor("eager", (1.9,), (0.9,)))
    assert joined == gate.Floor("eager", (1.9, 2.0, 2.2), (0.9, 1.0, 1.1))
    assert joined.can_hold
    assert not gate.Floor("eager", (3.0,), (1.0,)).after(joined).can_hold
    assert FLOOR.after(gate.Floor("copy", (9.0,), (1.0,))) == FLOOR


def test_floors_survive_the_file(tmp_path: Path) -> None:
    rows = {"t.py::one[1-2]": FLOOR, 't.py::two["a"]': gate.Floor("loop of slices", (12.3, 15.0), (1e-5, 2.0))}
    path = tmp_path / "floors.toml"
    gate.write_floors(gate.Floors(MACHINE, rows), path)
    assert gate.read_floors(path) == gate.Floors(MACHINE, rows)
    assert gate.read_floors(tmp_path / "missing.toml").rows == {}


def test_machines_are_compared_by_what_moves_ratios() -> None:
    assert not machine_difference(MACHINE, {**MACHINE, "torch": "2.13.1", "time": "2027"})
    for name, value in (("cpu", "B"), ("cores", 64), ("isa", "avx512"), ("torch", "2.12.0"), ("gpu", "H200")):
        assert name in machine_difference(MACHINE, {**MACHINE, name: value})
    known = {**MACHINE, "model": "143", "l2": "2048K"}
    assert not machine_difference(MACHINE, known), "what was not recorded is not known"
    assert machine_difference(known, {**known, "model": "207"}) == "recorded with model 143, but here it is 207"
    forced = machine_difference(MACHINE, {**MACHINE, "backend": "triton"})
    assert forced == "recorded with backend free choice, but here it is triton forced"


def test_others_are_seen_and_this_process_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others took two of ten seconds of two processors, one of them the host.

    This process took four.
    """
    second = os.sysconf("SC_CLK_TCK")
    stat, own = tmp_path / "stat", [0.0]
    monkeypatch.setattr(gate, "STAT", stat)
    monkeypatch.setattr(gate.os, "times", lambda: (own[0], 0.0))
    stat.write_text(f"cpu {' '.join(['100'] * 10)}\n")
    beside = gate.Others()
    assert beside.share() == 0.0
    user, system, idle, steal = (100 + second * seconds for seconds in (4, 1, 4, 1))
    stat.write_text(f"cpu {user} 100 {system} {idle} 100 100 100 {steal} 100 100\n")
    own[0] = 4.0
    assert beside.share() == pytest.approx(0.2)
    stat.unlink()
    assert gate.Others().share() == 0.0, "where the system does not tell"


# -- measuring ---------------------------------------------------------------------------------------------------------


CPU = torch.device("cpu")


def test_implementations_take_turns_and_each_starts_equally_often() -> None:
    order: list[str] = []

    class Told:
        def sample(self, run: timing.Run, count: int) -> float:
            return run()

        def wall(self, run: timing.Run, count: int) -> float | None:
            return 7.0

    def make(name: str, seconds: float) -> timing.Run:
        return lambda: (order.append(name), seconds)[1]

    runs = {name: make(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    samples, walls = timing.interleave(runs, 6, Told(), longest=60.0)
    assert samples == {"a": [1.0] * 6, "b": [2.0] * 6, "c": [3.0] * 6}
    assert walls == {name: [7.0] * 6 for name in runs}
    assert "".join(order[-18:]) == "abcbcacab" * 2
    samples, _ = timing.interleave(runs, 6, Told(), longest=0.0, fewest=2)
    assert len(samples["a"]) == 2


def test_cuda_clock_flushes_before_each_call_and_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The events come in this order on a stand-in for the device."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: "Event") -> float:
            return 2.0  # milliseconds

    def zeros(size: int, device: Any) -> Any:
        assert 4 * size >= 2 * 50_000_000
        return SimpleNamespace(sum=lambda: log.append("flush"))  # whatever else would write

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    delays: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", delays.append)
    properties = SimpleNamespace(L2_cache_size=50_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "zeros", zeros)
    clock = timing.CudaClock("cuda")  # type: ignore[arg-type]
    assert clock.sample(lambda: log.append("call"), 2) == 0.002
    assert log == ["wait", "call", *["flush", "event", "call", "event"] * 2, "wait"]
    assert len(delays) == 2
    assert 0 < delays[0] == delays[1] < timing.LONGEST_DELAY * timing.CYCLES
    clock.sample(lambda: time.sleep(0.01), 1)
    assert delays[2] == timing.LONGEST_DELAY * timing.CYCLES
    log.clear()
    assert clock.wall(lambda: log.append("call"), 2) is not None
    assert log == ["wait", "call", "call", "wait"]


def test_implementations_that_cannot_run_say_why() -> None:
    x = torch.zeros(2, 4, 3)
    for absent in (baselines.liger_kl(x[0], x[1], 2.0), baselines.liger_jsd(x)):
        assert isinstance(absent, baselines.Absent)
        assert "Liger-Kernel" in absent.reason
