"""What a measurement says about a floor, and the file of floors."""

from __future__ import annotations

import os
from pathlib import Path

import gate
import pytest
from comparisons import machine_difference

MACHINE = {"cpu": "A", "cores": 2, "isa": "avx2", "torch": "2.13.0+cpu"}
FLOOR = gate.Floor("eager", 2.0, 2.2)


@pytest.mark.parametrize(
    ("ratios", "scatter", "others", "outcome"),
    [
        ([2.0] * 15, 0.1, 0.0, "pass"),
        ([2.0] * 15, 3.0, 0.9, "pass"),  # fast enough, however noisy
        ([1.8] * 15, 0.1, 0.0, "pass"),
        ([2.0 / 1.3] * 15, 0.1, 0.0, "fail"),
        ([2.0 / 1.3] * 15, 0.5, 0.0, "skip"),
        ([2.0 / 1.3] * 15, 0.1, 0.5, "skip"),
        ([1.6] * 7 + [1.8] * 8, 0.1, 0.0, "pass"),
        ([1.6] * 8 + [1.8] * 7, 0.1, 0.0, "fail"),
    ],
)
def test_verdicts(ratios: list[float], scatter: float, others: float, outcome: str) -> None:
    verdict = gate.judge(FLOOR, ratios, scatter, others)
    assert verdict.outcome == outcome
    assert ("eager, below 1.8×" in verdict.reason) == (outcome != "pass")


def test_what_processes_saw_is_joined_and_only_steady_rows_are_held() -> None:
    joined = gate.Floor("eager", 2.1, 2.1).seen(gate.Floor("eager", 2.0, 2.05))
    assert joined == gate.Floor("eager", 2.0, 2.1)
    assert joined.steady
    assert not joined.seen(gate.Floor("eager", 2.5, 2.5)).steady
    assert joined.seen(gate.Floor("copy", 9.0, 9.0)) == joined


def test_floors_survive_the_file(tmp_path: Path) -> None:
    rows = {"t.py::one[1-2]": FLOOR, 't.py::two["a"]': gate.Floor("loop of slices", 12.3, 15.0)}
    path = tmp_path / "floors.toml"
    gate.write_floors(gate.Floors(MACHINE, rows), path)
    assert gate.read_floors(path) == gate.Floors(MACHINE, rows)
    assert gate.read_floors(tmp_path / "missing.toml").rows == {}


def test_machines_are_compared_by_what_moves_ratios() -> None:
    assert not machine_difference(MACHINE, {**MACHINE, "torch": "2.13.1", "time": "2027"})
    for name, other in (("cpu", "B"), ("cores", 64), ("isa", "avx512"), ("torch", "2.12.0"), ("gpu", "H200")):
        assert name in machine_difference(MACHINE, {**MACHINE, name: other})
    known = {**MACHINE, "model": "143", "l2": "2048K"}
    assert not machine_difference(MACHINE, known), "what was not recorded is not known"
    assert machine_difference(known, {**known, "model": "207"}) == "recorded with model 143, but here it is 207"
    forced = machine_difference(MACHINE, {**MACHINE, "backend": "triton"})
    assert forced == "recorded with backend free choice, but here it is triton forced"


def test_others_are_seen_and_this_process_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten seconds of two processors others took two, one of them the host; this process took four."""
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
