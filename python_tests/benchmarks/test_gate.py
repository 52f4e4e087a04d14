"""What a measurement says about a floor, which floors recorded results give, and what recording again keeps."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import comparisons
import gate
import pytest
from comparisons import Comparison, machine_difference, read_results, write_results

MACHINE = {"cpu": "A", "cores": 2, "isa": "avx2", "torch": "2.13.0+cpu", "time": "2026-01-01"}
ROW = Comparison(
    group="toy",
    case="[64, 10]",
    ours="fedkern",
    threads=1,
    loaded=False,
    pairs=15,
    seconds={"fedkern": 1e-4, "eager": 2e-4, "compile": 3e-4},
    speedup={"eager": 2.0, "compile": 3.0},
    scatter={"fedkern": 0.1, "eager": 0.1, "compile": 0.1},
    test="bench_toy.py::test_toy[small]",
)
FLOOR = gate.Floor("a", "toy", "[64, 10]", "cpu", 1, False, ROW.test, True, {"eager": 1.7})
STEADY = {"fedkern": 0.1, "eager": 0.1}


@pytest.mark.parametrize(
    ("ratios", "scatter", "outcome"),
    [
        ([2.0] * 15, STEADY, "pass"),
        ([2.0] * 15, {"fedkern": 3.0, "eager": 3.0}, "pass"),  # fast enough, however noisy
        ([1.6] * 15, STEADY, "fail"),
        ([1.6] * 15, {"fedkern": 0.1, "eager": 0.5}, "skip"),
        ([1.6] * 15, {"fedkern": 0.5, "eager": 0.1}, "skip"),
        ([1.6] * 8 + [1.8] * 7, STEADY, "pass"),  # the median is below, but that is no more than chance
    ],
)
def test_verdicts(ratios: list[float], scatter: dict[str, float], outcome: str) -> None:
    verdict = gate.judge(FLOOR, {"eager": ratios}, scatter, "fedkern")
    assert verdict.outcome == outcome
    assert (outcome == "pass") == (not verdict.reason)
    assert "eager" in verdict.reason or outcome == "pass"


def test_contestants_that_did_not_run_are_not_judged() -> None:
    assert gate.judge(replace(FLOOR, against={"compile": 9.0}), {"eager": [1.0]}, STEADY, "fedkern").outcome == "pass"


def test_bound_of_the_median_holds_as_often_as_it_says() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        held += gate.upper_median([draw.random() ** 3 for _ in range(21)]) >= 0.125  # the true median
    assert 0.93 < held / 2000 < 0.98
    assert gate.upper_median([1.0, 2.0]) == 2.0


def test_floors_of_results_survive_the_file(tmp_path: Path) -> None:
    slow = replace(ROW, case='a "slow" one', test="t::slow", seconds={"fedkern": 1.0, "eager": 2.0, "compile": 3.0})
    medium = replace(ROW, case="medium", test="t::medium", seconds={"fedkern": 1e-3, "eager": 1e-3, "compile": 1.0})
    loaded = replace(ROW, loaded=True, test="t::loaded")
    noisy = replace(ROW, case="noisy", test="t::noisy", scatter={"fedkern": 0.1, "eager": 0.9, "compile": 0.1})
    several = replace(ROW, case="two", threads=2, test="t::two")
    floors = gate.make_floors([("a", MACHINE, [ROW, slow, medium, loaded, noisy, several])])
    path = tmp_path / "floors.toml"
    gate.write_floors(floors, path)
    again = gate.read_floors(path)
    assert again.rows == floors.rows
    assert again.machines == {"a": {k: MACHINE[k] for k in ("cpu", "cores", "isa", "torch")}}
    assert {row.case for row in again.rows} == {"[64, 10]", 'a "slow" one', "medium", "noisy", "two"}
    found = again.of(ROW.key, {"a"})
    assert found is not None
    assert found.against == {"eager": 1.7, "compile": 2.55}
    assert again.of(noisy.key, {"a"}).against == {"compile": 2.55}  # type: ignore[union-attr]
    assert again.of(loaded.key, {"a"}) is None
    assert again.short_tests("cpu", {"a"}) == {ROW.test, "t::medium"}
    assert again.short_tests("cuda", {"a"}) == set()
    assert gate.read_floors(tmp_path / "missing.toml").rows == []


def test_contestants_shown_beside_have_no_floor() -> None:
    floors = gate.make_floors([("a", MACHINE, [replace(ROW, beside=["eager"])])])
    assert [row.against for row in floors.rows] == [{"compile": 2.55}]
    assert not gate.make_floors([("a", MACHINE, [replace(ROW, beside=["eager", "compile"])])]).rows


def test_of_two_floors_the_one_of_the_better_known_machine_counts() -> None:
    sure = replace(FLOOR, machine="sure", against={"eager": 1.2})
    machines = {"a": {"cpu": "A"}, "sure": {"cpu": "A", "model": "1"}}
    assert gate.Floors([FLOOR, sure], machines).of(FLOOR.key, {"a", "sure"}) == sure
    assert gate.Floors([FLOOR, sure], machines).of(FLOOR.key, {"a"}) == FLOOR


def test_machines_are_compared_by_what_moves_ratios() -> None:
    assert not machine_difference(MACHINE, {**MACHINE, "torch": "2.13.1", "time": "2027"})
    for name, other in (("cpu", "B"), ("cores", 64), ("isa", "avx512"), ("torch", "2.12.0"), ("gpu", "H200")):
        assert name in machine_difference(MACHINE, {**MACHINE, name: other})
    assert set(gate.MOVES) == {*comparisons.IDENTITY, *comparisons.CHIP}
    known = {**MACHINE, "model": "143", "l2": "2048K"}
    assert not machine_difference(MACHINE, known), "what was not recorded is not known"
    assert not machine_difference(known, MACHINE)
    assert machine_difference(known, {**known, "model": "207"}) == "recorded with model 143, but here it is 207"
    forced = machine_difference(MACHINE, {**MACHINE, "backend": "triton"})
    assert forced == "recorded with backend free choice, but here it is triton forced"


def test_recording_a_few_tests_adds_to_the_file(tmp_path: Path) -> None:
    other = replace(ROW, case="other", test="bench_toy.py::test_other")
    gone = replace(ROW, case="gone", test="bench_toy.py::test_gone")
    foreign = replace(ROW, case="foreign", test="bench_else.py::test_foreign")
    write_results([ROW, other, gone, foreign], MACHINE, tmp_path)
    renamed = replace(ROW, case="[64, 20]", speedup={"eager": 5.0})
    collected = [ROW.test, other.test]
    (path,) = write_results([renamed], MACHINE, tmp_path, collected=collected)
    (recorded,) = read_results(tmp_path)["toy"]
    assert [row.case for row in recorded.rows] == ["other", "foreign", "[64, 20]"]
    assert recorded.rows[2] == renamed
    assert path.name == "toy-a.json"
    (path,) = write_results([replace(ROW, device="cuda")], {**MACHINE, "gpu": "NVIDIA H200"}, tmp_path)
    assert path.name == "toy-cuda-nvidia-h200.json"
    assert [recorded.name for recorded in read_results(tmp_path)["toy"]] == ["toy-a", "toy-cuda-nvidia-h200"]
