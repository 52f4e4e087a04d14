"""Tests of the stages for a machine with a GPU, as far as a CPU can play them."""

import json
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import stages
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


@pytest.mark.parametrize("method", stages.PUBLISHED)
def test_published_settings_are_settings(method):
    words = [method, *stages.PUBLISHED[method][0].split(), "--data-root", "DIR"]
    assert effective_config(parse_run(words)).method == method


def test_no_gpu_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--out", "nowhere"])
    assert ended.value.code == 2
    assert "there is no NVIDIA GPU here" in capsys.readouterr().err
    assert not Path("nowhere").exists()


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
