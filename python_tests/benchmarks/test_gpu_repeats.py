"""Tests of `python -m benchmarks.gpu.repeats`, which compares two runs of one seed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import bench_methods
from benchmarks.gpu import repeats, stages

LITTLE = {"data": "digits", "train_samples": 60, "width": 2, "rounds": 2, "local_steps": 1, "clients": 2}


def run_folder(path: Path, weight: float = 0.0, rounds: int = 2, **changes) -> Path:
    """Write the files of a run of two rounds that are compared.

    ``changes`` go into the last round.
    """
    path.mkdir()
    save_file({"a": torch.ones(2), "b": torch.full((3,), weight)}, path / repeats.MODEL)
    records = [{"round": i + 1, "accuracy": 0.5, "clients": {"0": {"loss": 1.0}}} for i in range(rounds)]
    records[-1].update(changes)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_times_and_load_are_not_compared(tmp_path):
    clients = {"0": {"loss": 1.0, "seconds": 2.0}}
    run = run_folder(tmp_path / "first")
    second = run_folder(
        tmp_path / "second", clients=clients, seconds=1.0, round_seconds=3.0, phases={"train": 1.0}, device={"peak": 1}
    )
    assert repeats.differences(run, second) == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"weight": 1e-30}, ["1 of the model's 2 tensors, b first"]),
        ({"weight": -0.0}, ["1 of the model's 2 tensors, b first"]),
        ({"accuracy": 0.25}, ["metrics from round 2 on: accuracy"]),
        ({"clients": {"0": {"loss": 2.0}}}, ["metrics from round 2 on: clients"]),
        ({"loss": 1.0}, ["metrics from round 2 on: loss"]),
        ({"rounds": 1}, ["2 and 1 rounds"]),
        ({"weight": 1.0, "loss": 0.0}, ["1 of the model's 2 tensors, b first", "metrics from round 2 on: loss"]),
    ],
)  # fmt: skip
def test_what_differs_is_named(changed, told, tmp_path):
    original, second = run_folder(tmp_path / "first"), run_folder(tmp_path / "second", **changed)
    assert repeats.differences(original, second) == told


def test_a_nan_is_the_same_bits(tmp_path):
    nan = float("nan")
    assert repeats.differences(run_folder(tmp_path / "first", nan), run_folder(tmp_path / "second", nan)) == []


def test_a_difference_is_one_sentence_and_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(repeats, "play", lambda case, device, folder: run_folder(folder, float(folder.name == "first")))
    assert repeats.main(["fedgid", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert said == "fedgid: two runs on cpu with one seed differ: 1 of the model's 2 tensors, b first\n"


def test_no_gpu_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        repeats.main(["fedavg"])
    assert ended.value.code == 2
    assert "--device cuda: torch sees no CUDA device; give --device cpu" in capsys.readouterr().err


def test_every_method_and_network_has_a_stage():
    assert stages.METHODS == bench_methods.METHODS
    names = [stage.name for stage in stages.plan("9.0", Path("/out"), "/data")]
    wanted = [f"repeats {name}" for name in (*bench_methods.METHODS, *stages.NETWORKS)]
    assert [name for name in names if name.startswith("repeats ")] == wanted
    assert names.index(wanted[-1]) < names.index("published fusefl")
    for stage in stages.repeats():
        assert stage.command[-3:] == (stage.name.split()[1], "--device", "cuda")


@pytest.mark.parametrize("settings", [LITTLE, {**LITTLE, "lr": -1.0}], ids=["alike", "failed"])
def test_two_runs(settings, monkeypatch, capsys):
    monkeypatch.setattr(bench_methods, "CASES", (bench_methods.Case("fedavg", "default", settings),))
    code = repeats.main(["fedavg", "--device", "cpu"])
    said = capsys.readouterr().out
    if "lr" in settings:
        assert code == 1
        assert "failed with exit code 2" in said
    else:
        assert code == 0
        assert said == "fedavg: two runs on cpu with one seed have the same model and metrics\n"
