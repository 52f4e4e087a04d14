"""Tests of bench_rounds: the task that all programs share, and the processes that play it."""

import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import bench_rounds, harness
from benchmarks.baselines import Absent
from benchmarks.rounds import lean, ours, setting
from benchmarks.rounds.plays import Failed, Program, play
from benchmarks.rounds.setting import Setting
from benchmarks.rounds.task import NETWORKS, Task
from fedkern import models
from python_tests.interrupted import wait_until


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """Return a task of two clients, two rounds and 20 synthetic images."""
    monkeypatch.setattr(setting, "TEST", 500)
    folder = tmp_path / "task"
    folder.mkdir()
    setting.write(Setting("cnn", 4, 2, samples=20, rounds=1, batch_size=8), folder)
    return Task.load(folder)


@pytest.mark.parametrize(("name", "width"), [("cnn", 8), ("resnet8", 16), ("resnet18", 16)])
def test_networks_are_those_of_fedkern(name: str, width: int) -> None:
    theirs = models.build(name, classes=10, channels=3, image_size=32, seed=0, width=width)
    plain = NETWORKS[name](width)
    plain.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(images), theirs(images))


def _final(task: Task, main: object, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    out.mkdir()
    monkeypatch.setattr(sys, "argv", ["adapter", str(task.folder), str(out), "1", "1", "1"])
    main()  # type: ignore[operator]
    return torch.load(out / "final.pt", weights_only=True)


def test_engine_and_lean_loop_play_the_same_rounds(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = _final(task, lean.main, tmp_path / "lean", monkeypatch)
    own = _final(task, ours.main, tmp_path / "ours", monkeypatch)
    assert theirs.keys() == own.keys() == task.initial.keys()
    for name, value in theirs.items():
        if value.is_floating_point():
            torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert any(not torch.equal(theirs[name], task.initial[name]) for name in theirs)


def _program(folder: Path, text: str) -> Path:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_program_that_fails_says_why_and_leaves_no_process_behind(task: Task, tmp_path: Path) -> None:
    left = tmp_path / "left"
    # A daemon: another session, another parent.
    script = f"setsid sleep 300 >/dev/null 2>&1 &\necho $! > {left}\necho 'no such package' >&2\nexit 3"
    with pytest.raises(Failed, match="no such package"):
        play(Program("x", "x", _program(tmp_path, script)), task)
    status = Path("/proc") / left.read_text().strip() / "stat"

    def has_ended() -> bool:
        """Return whether the process is gone or a zombie."""
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX"

    wait_until(has_ended, 30)  # a killed process is still running until its memory is freed


def test_a_program_that_takes_too_long_is_ended(task: Task, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(Failed, match="longer than 1 s"):
        play(Program("x", "x", _program(tmp_path, "sleep 300")), task, limit=1.0)
    assert time.monotonic() - start < 20


def test_a_framework_without_an_environment_is_absent_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(harness.SETTINGS, "environments", {"fluke": tmp_path})
    _, found = bench_rounds.programs(2)
    assert found["Flower"] == Absent("no --environment flower=DIR was given")
    assert isinstance(found["fluke"], Program)
    assert found["fluke"].python == tmp_path / "bin" / "python"


def test_on_a_gpu_programs_are_told_so_and_frameworks_without_an_adapter_are_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_rounds.harness.SETTINGS, "environments", {"flower": tmp_path, "fluke": tmp_path})
    judged, found = bench_rounds.programs(1, "cuda")
    assert judged == "fedkern serial"
    playing = {name: program for name, program in found.items() if isinstance(program, Program)}
    assert set(playing) == {"fedkern serial", "lean loop", "Flower"}
    assert {program.device for program in playing.values()} == {"cuda"}
    assert (playing["Flower"].threads, playing["Flower"].workers) == (1, 2)
    assert found["fluke"].reason == "its adapter trains on the CPU"
    assert "Flower" not in bench_rounds.programs(1)[1]


def test_the_judged_program_chooses_its_workers() -> None:
    name, found = bench_rounds.programs(2)
    assert name == "fedkern auto"
    assert [found[f"fedkern {kind}"].words for kind in ("serial", "workers", "auto")] == [("1",), ("2",), ("auto",)]
    assert bench_rounds.programs(1)[0] == "fedkern serial"
