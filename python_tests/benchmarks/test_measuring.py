"""Tests of the benchmarks' instruments: clocks, turns, peak memory."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import baselines, timing

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


def test_cpu_clock_tells_seconds_per_call() -> None:
    assert 0.002 <= timing.CpuClock().sample(lambda: time.sleep(0.002), 3) < 0.2


def test_thread_clock_does_not_count_waiting() -> None:
    clock = timing.clock(CPU, one_thread=True)
    assert clock.sample(lambda: time.sleep(0.05), 1) < 0.02
    assert clock.sample(lambda: sum(range(100_000)), 1) > 1e-4


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
