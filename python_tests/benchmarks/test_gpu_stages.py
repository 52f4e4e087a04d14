"""The stages for a machine with a GPU, as far as they can be tried without one."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import playing, published, stages
from benchmarks.gpu.playing import CUT, FAILED, PASSED, RECORD, Playing
from benchmarks.gpu.stages import ROOT, Stage
from fedkern.cli.flags import parse
from fedkern.cli.request import effective

GPU = {"gpu": "a GPU", "capability": "9.0"}


def python(name: str, code: str, seconds: int = 60, **more) -> Stage:
    return Stage(name, (sys.executable, "-c", code), seconds, **more)


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


def test_what_failed_comes_after_what_was_never_played(tmp_path):
    asked = [python("bad", "raise SystemExit(1)"), python("good", "")]
    Playing(tmp_path / "out", GPU, "code").play(asked[:1])
    playing = Playing(tmp_path / "out", GPU, "code")
    order = []
    playing._run = lambda stage, limit, cut: order.append(stage.name) or {"outcome": FAILED, "seconds": 0, "last": ""}
    playing.play(asked)
    assert order == ["good", "bad"]
    Playing(tmp_path / "out", GPU, "other code", 3600).play(asked)  # all of it is new
    assert outcomes(tmp_path / "out") == {"bad": FAILED, "good": PASSED}


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
    first = (tmp_path / "out/logs/long.log").read_text().split()[0]
    limit = time.monotonic() + 10
    while Path(f"/proc/{first}/cmdline").exists() and Path(f"/proc/{first}/cmdline").read_bytes():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_stages_for_which_no_time_is_left_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(playing, "LEAST", 0.2)
    asked = [python("one", "import time; time.sleep(600)"), python("two", "")]
    left = Playing(tmp_path / "out", GPU, "code", seconds=1.5, patience=0.0).play(asked)
    assert [stage.name for stage in left] == ["two"]
    assert outcomes(tmp_path / "out") == {"one": CUT}  # no failure: it had less time than it may take


def test_a_stage_that_finds_nothing_to_do_is_not_played(tmp_path):
    ready, missing = ((sys.executable, "-c", f"raise SystemExit({code})") for code in (0, 1))
    Playing(tmp_path / "out", GPU, "code").play(
        [python("built", "", ready=ready), python("missing", "", ready=missing)]
    )
    assert outcomes(tmp_path / "out") == {"missing": PASSED}


def test_the_plan():
    every = stages.plan("9.0", Path("/out"), "/data")
    names = [stage.name for stage in every]
    assert len(set(names)) == len(names)
    assert names[:3] == ["build", "doctor", "tests"]
    assert names.index("kernels") < names.index("memcheck")
    assert len(names) < 60
    assert names[-3:] == ["published fusefl", "published fediod", "published fedgid"]
    assert every[0].environment["CUDAARCHS"] == "90-real"
    assert {stage.environment.get("SANITIZER") for stage in every} == {None, *stages.SANITIZERS}
    assert all(stage.seconds <= 600 for stage in every if not stage.goes_on)
    folders = [ROOT / each for each in stages.TESTED]
    for path in (ROOT / "python_tests").rglob("test_*.py"):
        if "pytest.mark.gpu" in path.read_text() and path.name != Path(__file__).name:
            assert any(folder in path.parents for folder in folders), f"no stage plays {path}"
    assert not any("published" in stage.name for stage in stages.plan("9.0", Path("/out"), None))


@pytest.mark.parametrize("stage", stages.traces(Path("/out")), ids=lambda stage: stage.name)
def test_traced_runs_are_runs(stage, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    request = parse([*stage.command[3:], "--profile"])
    assert effective(request).device == "cuda"


@pytest.mark.parametrize("method", stages.PUBLISHED)
def test_published_settings_are_settings(method):
    words = [method, *stages.PUBLISHED[method][0].split(), "--data-root", "DIR"]
    assert effective(parse(words)).method == method


def test_a_run_is_begun_and_gone_on_with(tmp_path, capsys):
    out = tmp_path / "run"
    words = [
        "fedavg", "--data", "digits", "--train-samples", "60", "--width", "2", "--rounds", "2", "--local-steps", "1",
        "--clients", "2", "--grad-cam", "0", "--workers", "1", "--quiet", "--out", str(out),
    ]  # fmt: skip
    assert published.reached("fedavg", out) == "fedavg: no round is done"
    assert published.main(words) == 0
    assert "fedavg: 2 rounds, accuracy" in capsys.readouterr().out
    assert published.main(words) == 0  # a folder that holds a run is resumed, not refused


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


@pytest.mark.exhaustive
def test_the_script_lists_its_stages():
    done = subprocess.run(
        ["benchmarks/gpu/all.sh", "--list"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert "memcheck: not played" in done.stdout
