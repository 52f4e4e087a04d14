"""Tests of programs for a GPU as far as a CPU can play them: stages, repeated runs, and the reader of traces."""

import json
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import bench_methods
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import repeats, stages, trace
from benchmarks.gpu.playing import CUT, FAILED, PASSED, RECORD, Playing
from benchmarks.gpu.stages import ROOT, Stage
from fedkern.cli.flags import parse_run
from fedkern.cli.request import effective_config
from python_tests.interrupted import wait_until

GPU = {"gpu": "a GPU", "capability": "9.0"}


def python(name: str, code: str, seconds: int = 60, **settings) -> Stage:
    return Stage(name, (sys.executable, "-c", code), seconds, **settings)


def outcomes(out: Path) -> dict[str, str]:
    return {name: found["outcome"] for name, found in json.loads((out / RECORD).read_text())["stages"].items()}


def test_what_has_passed_is_not_played_again(tmp_path):
    mark = tmp_path / "mark"
    counting = f"open({str(mark)!r}, 'a').write('x')"
    asked = [python("good", counting), python("bad", f"{counting}; raise SystemExit('it broke')")]
    for length in (2, 3):  # the good one once, the bad one every time
        assert Playing(tmp_path / "out", GPU, "code").play(asked) == []
        assert outcomes(tmp_path / "out") == {"good": PASSED, "bad": FAILED}
        assert len(mark.read_text()) == length
    found = json.loads((tmp_path / "out" / RECORD).read_text())
    assert found["machine"] == GPU
    assert found["stages"]["bad"]["last"] == "it broke"
    assert found["stages"]["bad"]["exit"] == 1
    Playing(tmp_path / "out", GPU, "other code").play(asked[:1])
    assert len(mark.read_text()) == 4
    Playing(tmp_path / "out", GPU, "other code").play(asked[:1], again=True)
    assert len(mark.read_text()) == 5


@pytest.mark.parametrize(("goes_on", "outcome"), [(False, FAILED), (True, CUT)])
def test_a_stage_that_takes_too_long_is_ended_with_all_it_started(goes_on, outcome, tmp_path):
    mark = tmp_path / "kept"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        f"try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    open({str(mark)!r}, 'w').close()\n"
    )
    begun = time.monotonic()
    Playing(tmp_path / "out", GPU, "code").play([python("long", code, 2, goes_on=goes_on)])
    assert time.monotonic() - begun < 30
    assert outcomes(tmp_path / "out") == {"long": outcome}
    assert mark.exists()  # it was asked, as by Ctrl-C, before anything was killed
    pid = (tmp_path / "out/logs/long.log").read_text().split()[0]
    command = Path(f"/proc/{pid}/cmdline")
    wait_until(lambda: not command.exists() or not command.read_bytes(), 10)


def test_the_plan():
    plan = stages.plan("9.0", Path("/out"), "/data")
    names = [stage.name for stage in plan]
    assert len(set(names)) == len(names)
    assert names[:3] == ["build", "doctor", "tests"]
    assert names.index("kernels") < names.index("memcheck")
    assert len(names) < 60
    assert names[-3:] == ["published fusefl", "published fediod", "published fedgid"]
    assert plan[0].environment["CUDAARCHS"] == "90-real"
    assert {stage.environment.get("SANITIZER") for stage in plan} == {None, *stages.SANITIZERS}
    assert all(stage.seconds <= 600 for stage in plan if not stage.goes_on)
    folders = [ROOT / folder for folder in stages.TESTED]
    for path in (ROOT / "python_tests").rglob("test_*.py"):
        if "pytest.mark.gpu" in path.read_text() and path.name != Path(__file__).name:
            assert any(folder in path.parents for folder in folders), f"no stage plays {path}"
    assert not any("published" in stage.name for stage in stages.plan("9.0", Path("/out"), None))


@pytest.mark.parametrize("stage", stages.traces(Path("/out")), ids=lambda stage: stage.name)
def test_traced_runs_are_runs(stage, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    request = parse_run([*stage.command[3:], "--profile"])
    assert effective_config(request).device == "cuda"


def test_stages_are_chosen_by_name_and_packed(tmp_path, monkeypatch, capsys):
    asked = [python("test one", "print('fine')"), python("test two", ""), python("doctor", "raise SystemExit(1)")]
    monkeypatch.setattr(command, "gpu", lambda: GPU)
    monkeypatch.setattr(command, "plan", lambda *_: asked)
    with pytest.raises(SystemExit):
        command.main(["tests", "--out", str(tmp_path / "out")])
    assert "there is no stage 'tests'" in capsys.readouterr().err
    packed = tmp_path / "all.tar.gz"
    assert command.main(["test", "--out", str(tmp_path / "out"), "--packed", str(packed)]) == 0
    assert outcomes(tmp_path / "out") == {"test one": PASSED, "test two": PASSED}
    with tarfile.open(packed) as content:
        assert {"stages.json", "logs/test-one.log"} <= set(content.getnames())
    assert command.main(["--out", str(tmp_path / "new"), "--packed", str(packed)]) == 1
    assert outcomes(tmp_path / "new") == {"test one": PASSED, "test two": PASSED, "doctor": FAILED}
    assert "failed: doctor" in capsys.readouterr().out
    command.main(["--list", "--out", str(tmp_path / "new")])
    assert "doctor: failed" in capsys.readouterr().out


# -- gpu repeats -------------------------------------------------------------------------------------------------------


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


def test_a_difference_is_one_sentence_and_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(repeats, "play", lambda case, device, folder: run_folder(folder, float(folder.name == "first")))
    assert repeats.main(["fedgid", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert said == "fedgid: two runs on cpu with one seed differ: 1 of the model's 2 tensors, b first\n"


def test_every_method_and_network_has_a_stage():
    assert stages.METHODS == bench_methods.METHODS
    names = [stage.name for stage in stages.plan("9.0", Path("/out"), "/data")]
    wanted = [f"repeats {name}" for name in (*bench_methods.METHODS, *stages.NETWORKS)]
    assert [name for name in names if name.startswith("repeats ")] == wanted
    assert names.index(wanted[-1]) < names.index("published fusefl")
    for stage in stages.repeats():
        assert stage.command[-3:] == (stage.name.split()[1], "--device", "cuda")


# -- gpu trace ---------------------------------------------------------------------------------------------------------


def event(category, name, begin, length, **fields):
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": length, "tid": 1, **fields}


EVENTS = [
    event("cpu_op", "aten::conv2d", 0, 100),
    event("cpu_op", "aten::convolution", 10, 80),
    event("cuda_runtime", "cudaLaunchKernel", 20, 10),
    event("kernel", "conv", 50, 300, tid=7, args={"stream": 7}),
    event("cpu_op", "aten::item", 120, 400),
    event("cpu_op", "aten::_local_scalar_dense", 130, 380),
    event("cuda_runtime", "cudaMemcpyAsync", 140, 10),
    event("cuda_runtime", "cudaStreamSynchronize", 160, 340),
    event("gpu_memcpy", "Memcpy DtoH", 300, 100, tid=7, args={"stream": 7}),
    event("cuda_runtime", "cudaDeviceSynchronize", 900, 100),
]


def test_waits_and_idle_time_are_counted(tmp_path):
    found = trace.figures(EVENTS)
    assert found["seconds"] == pytest.approx(1e-3)
    assert found["busy"] == pytest.approx(0.35)  # 50 to 400: what overlaps counts once
    assert found["kernels"] == 1
    assert found["waits"] == {
        "aten::_local_scalar_dense": [1, pytest.approx(340e-6)],
        "no operator": [1, pytest.approx(100e-6)],
    }
    trace.draw(EVENTS, tmp_path / "trace.png", "made up")
    assert (tmp_path / "trace.png").stat().st_size > 5000
