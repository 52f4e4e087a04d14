"""Tests of `fifteen.sh`, line by line, on a pretended GPU: the CPU computes, and the CPU's clock counts."""

import json
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_methods, comparisons, gpu_figures, timing
from benchmarks.gpu import fifteen, kernels, stages, without
from benchmarks.gpu.playing import FAILED, PASSED, RECORD
from benchmarks.gpu.stages import ROOT, Stage
from fedkern.cli.flags import parse_run
from fedkern.cli.request import effective_config
from fedkern.engine.local import lanes, training
from python_tests.ops.emulated_core import emulate
from python_tests.ops.every_operator import OPERATORS

H200 = {"gpu": "NVIDIA H200", "capability": "9.0"}
H100 = {"gpu": "NVIDIA H100 80GB HBM3", "capability": "9.0"}
MACHINE = {"time": "2026-11-29T03:00:00+00:00", "torch": "2.11.0+cu130", "core": "1"}
LINES = {line.name: line for line in fifteen.lines("9.0", Path("/out"))}


def python(name: str, code: str) -> Stage:
    return Stage(name, (sys.executable, "-c", code), 20)


def words_of(name: str) -> list[str]:
    """Return the arguments of a line's module."""
    return list(LINES[name].command[3:])


# -- the two commands --------------------------------------------------------------------------------------------------


def test_all_lines_have_their_time() -> None:
    kinds = " ".join(dict.fromkeys(name.split()[0] for name in LINES))
    assert kinds == "build doctor tests kernels reference run rounds trace compile"
    assert sum(line.seconds for line in LINES.values()) + fifteen.PATIENCE <= fifteen.FIRST <= 550
    checks = fifteen.checks(known=True)
    names = ["memcheck", "racecheck", "repeats fedgid", "repeats vit-tiny", "repeats unet-small"]
    assert [check.name for check in checks] == names
    assert sum(check.seconds for check in checks) + fifteen.PATIENCE <= fifteen.AGAIN <= 150
    assert LINES["build"].environment["CUDAARCHS"] == "90-real"
    assert not LINES["build"].ready  # a machine has nothing


def test_another_card_is_compared_with_itself_alone() -> None:
    assert [check.name for check in fifteen.checks(known=False)] == ["memcheck", "racecheck"]
    written = [path for path in (ROOT / "benchmarks").rglob("*.py") if f'"{gpu_figures.GPU}"' in path.read_text()]
    assert written == [ROOT / "benchmarks" / "gpu_figures.py"]  # the kind is named once


@pytest.fixture
def fake_gpu(tmp_path, monkeypatch):
    """Pretend a GPU that nvidia-smi lists, a folder beside the checkout, and three lines and a check."""
    monkeypatch.setattr(fifteen, "gpu", lambda: H200)
    monkeypatch.setattr(fifteen, "code", lambda: "code")
    monkeypatch.setattr(fifteen, "BESIDE", tmp_path / "beside")
    monkeypatch.delenv("OUT", raising=False)
    (tmp_path / "out").mkdir()
    archive = tmp_path / "out" / fifteen.ARCHIVE
    look = f"import sys, tarfile; sys.exit('logs/build.log' not in tarfile.open({str(archive)!r}).getnames())"
    raw = f"p = {str(tmp_path / 'beside')!r}; open(p + '/profile.json.gz', 'w'); open(p + '/figures.json', 'w')"
    twice = f"import os, sys; sys.exit(os.path.exists({str(tmp_path / 'broken')!r}))"
    (tmp_path / "broken").touch()
    asked = [python("build", raw), python("tests", look), python("kernels", twice)]
    monkeypatch.setattr(fifteen, "lines", lambda *given: asked)
    monkeypatch.setattr(fifteen, "checks", lambda known: [python("memcheck", f"print({known})")])
    monkeypatch.setattr(stages, "build", lambda capability: replace(asked[0], ready=(sys.executable, "-c", "")))
    return archive


def outcomes(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as packed:
        found = packed.extractfile(RECORD)
        return {name: stage["outcome"] for name, stage in json.load(found)["stages"].items()}


def test_an_archive_after_every_line_a_table_last_and_what_failed_again(fake_gpu, tmp_path, capsys) -> None:
    assert fifteen.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-1].startswith("| kernels | failed |")
    assert outcomes(fake_gpu) == {"build": PASSED, "tests": PASSED, "kernels": FAILED}
    with tarfile.open(fake_gpu) as packed:
        assert "figures.json" in packed.getnames()
        assert "profile.json.gz" not in packed.getnames()
    fake_gpu.unlink()  # the folder of a second command is empty
    (tmp_path / "broken").unlink()
    assert fifteen.main(["again", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^(\w+) \.\.\.", said, re.MULTILINE) == ["kernels", "memcheck"]
    assert outcomes(fake_gpu) == dict.fromkeys(("build", "tests", "kernels", "memcheck"), PASSED)


@pytest.mark.parametrize(
    ("words", "found", "told"),
    [
        ([], H200, "name the archive's folder with --out DIR or in the variable OUT"),
        (["--out", "x"], None, "there is no NVIDIA GPU here"),
        (["again", "--out", "x"], H200, "nothing was played here: leave 'again' out"),
    ],
)
def test_what_it_cannot_take_is_one_sentence(words, found, told, fake_gpu, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fifteen, "gpu", lambda: found)
    with pytest.raises(SystemExit) as ended:
        fifteen.main(words)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


# -- lines -------------------------------------------------------------------------------------------------------------


class Pretended(timing.CpuClock):
    """Clock of the CPU in place of CUDA events."""

    def __init__(self, device: torch.device) -> None:
        pass

    def wall(self, run: timing.Run, count: int) -> float:
        return self.sample(run, 1)


@pytest.fixture
def small(monkeypatch):
    """Return small cases of the kernels, on the CPU."""
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "CudaClock", Pretended)
    monkeypatch.setattr(kernels, "SAMPLES", 1)
    monkeypatch.setattr(kernels, "VECTORS", {"large": 12})
    monkeypatch.setattr(kernels, "ROWS", {"large": (4, 8)})
    monkeypatch.setattr(kernels, "MAPS", {"large": (2, 4, 24, 24)})
    monkeypatch.setattr(kernels.machines, "machine", lambda device: dict(MACHINE))
    monkeypatch.setattr(kernels.machines, "served_by", lambda device: ("cuda", "1"))


@pytest.mark.parametrize("known", [pytest.param(H200, marks=pytest.mark.slow), H100], ids=["H200", "H100"])
def test_kernels_and_the_reference(small, known, tmp_path) -> None:
    with emulate():
        for name in ("kernels", "reference"):
            words = words_of(name)
            words[words.index("--results") + 1] = str(tmp_path / "results")
            assert kernels.main(words) == 0
    content = json.loads((tmp_path / "results" / kernels.FILE).read_text())
    assert all("seconds" in row for row in content["rows"])
    found = "\n".join(fifteen.make_tables(tmp_path, known, {}))
    cells = next(line for line in found.splitlines() if line.startswith("| `median` |")).split(" | ")
    brackets = r"\d+ % \(\d+ %\)" if known is H200 else r"\d+ %"
    assert all(re.fullmatch(brackets, cell) for cell in cells[2:6])
    assert cells[-1].endswith("× |")


def test_all_words_name_cases_and_tests() -> None:
    cases = [f"{name} {size}" for name, size, _ in kernels.cases(torch.float32, odd=False)]
    asked = [*fifteen.CHANGED, *(f"{name} large" for name in fifteen.WITHOUT_TRITON)]
    assert [word for word in asked if not any(f"{case} ".startswith(f"{word} ") for case in cases)] == []
    tested = {operator.name.split()[0] for operator in OPERATORS}
    assert tested.issuperset(fifteen.CHANGED)
    recorded = {row.test for files in comparisons.read_results().values() for file in files for row in file.rows}
    nodes = [word.removeprefix("benchmarks/") for word in words_of("compile") if "::" in word]
    assert len(nodes) == 3
    assert recorded.issuperset(nodes)
    assert all((ROOT / folder).exists() for folder in fifteen.TESTED)
    assert set(fifteen.RUNS) <= set(bench_methods.METHODS)


@pytest.mark.parametrize("name", ["tests", "compile", "memcheck"])
def test_pytest_finds_what_a_line_names(name, monkeypatch) -> None:
    monkeypatch.delenv("FEDKERN_TESTS_SHARE", raising=False)
    line = LINES.get(name) or fifteen.checks(known=True)[0]
    words = [word for word in line.command[3:] if word not in ("cuda", "--device", "--record", "-q", "-n", "9")]
    asked = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *words]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    count = int(re.findall(r"(\d+)(?:/\d+)? tests collected", found.stdout)[-1])
    assert count == 3 if name == "compile" else count >= len(fifteen.CHANGED)


@pytest.mark.parametrize("name", [name for name in LINES if name.startswith("run ")])
def test_runs_are_runs(name, monkeypatch) -> None:
    part, *words = words_of(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert effective_config(parse_run(words)).rounds == 12
    assert ("without" in name) == (part != "nothing")
    played = []
    monkeypatch.setattr(without, "play", lambda given: played.append((given, training.is_replayable, lanes.MOST)) or 0)
    for module, attribute, _ in without.PARTS.values():
        monkeypatch.setattr(module, attribute, getattr(module, attribute))  # taken back afterwards
    before = training.is_replayable
    assert without.main([part, *words]) == 0
    ((given, used, lane_limit),) = played
    assert given == words
    assert (used is before) == (part != "graphs")
    assert part != "graphs" or used(object, None) is False
    assert (lane_limit > 1) == (part != "lanes")
