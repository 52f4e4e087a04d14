"""The benchmarks' command line from recording to the gate, on a toy benchmark whose times are told, not measured."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"

TOY = '''
"""Contestants that return their own duration."""
import harness
import pytest
import timing
from contestants import Absent


class Told:
    def sample(self, run, count):
        said = run()
        return said if isinstance(said, float) else 1e-6  # the copy among them says nothing

    def wall(self, run, count):
        return None


timing.clock = lambda device, **kind: Told()


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_toy(benchmark, size):
    seconds = {"small": 1e-4, "medium": 1e-3, "large": 1e-1}[size]
    runs = {
        "fedkern": lambda: seconds,
        "eager": lambda: 2 * seconds,
        "compile": lambda: 4 * seconds,
        "Liger-Kernel": Absent("Liger-Kernel needs a GPU"),
    }
    harness.compare(
        benchmark, "toy", size, runs, model_bytes=8000, copy=True, threads=1, floors={"eager": 3.0}, note="told"
    )


def test_noise(benchmark):
    times = [1e-3, 9e-3] * 1000
    harness.compare(benchmark, "noise", "any", {"fedkern": lambda: 1e-3, "eager": times.pop}, threads=1)


def test_other_machine(benchmark):
    harness.compare(benchmark, "elsewhere", "any", {"fedkern": lambda: 1e-3, "eager": lambda: 2e-3}, threads=1)


def test_many_threads(benchmark):
    harness.compare(benchmark, "threads", "any", {"fedkern": lambda: 1e-3, "eager": lambda: 2e-3}, threads=99)


def test_new(benchmark):
    harness.compare(benchmark, "new", "any", {"fedkern": lambda: 1e-3, "eager": lambda: 2e-3}, threads=1)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the frame around the toy, recorded, with floors and a page of documentation."""
    folder = tmp_path_factory.mktemp("frame")
    (folder / "benchmarks").mkdir()
    for path in HERE.glob("*.py"):
        if not path.name.startswith("bench_"):
            shutil.copy(path, folder / "benchmarks")
    (folder / "benchmarks" / "bench_toy.py").write_text(TOY)
    (folder / "pytest.ini").write_text(
        "[pytest]\npythonpath = benchmarks\npython_files = bench_*.py\naddopts = --import-mode=importlib -ra\n"
    )
    (folder / "docs").mkdir()
    (folder / "docs" / "ops.md").write_text(
        "before\n<!-- measured: toy, nothing -->\nold\n<!-- end -->\n<!-- measured: nothing -->\n<!-- end -->\nafter\n"
    )
    recorded = run(folder, "-m", "pytest", "benchmarks", "--record", "--deselect", "benchmarks/bench_toy.py::test_new")
    assert recorded.returncode == 0, recorded.stdout + recorded.stderr
    assert "below what is promised: toy small (1 thread): 3× eager" in recorded.stdout
    for arguments in ((), ("--floors",)):
        made = run(folder, "-m", "benchmarks.report", *arguments)
        assert made.returncode == 0, made.stderr
    return folder


COMPILED = '''
"""Twelve shapes of one function, more than torch.compile compiles before it gives up in silence."""
import harness
import pytest
import torch

BUILT = []


def counting(graph, inputs):
    BUILT.append(inputs)
    return graph.forward


def double(x):
    return x * 2


@pytest.mark.parametrize("rows", range(1, 13))
def test_shape(benchmark, rows):
    compiled, x, before = torch.compile(double, backend=counting, dynamic=False), torch.ones(rows), len(BUILT)
    contestants = {"fedkern": lambda: x * 2, "compile": lambda: compiled(x)}
    harness.compare(benchmark, "compiled", str(rows), contestants, threads=1, pairs=3)
    assert len(BUILT) > before
'''


@pytest.mark.exhaustive
def test_every_shape_is_compiled(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "frame")
    (tmp_path / "frame" / "benchmarks" / "bench_toy.py").write_text(COMPILED)
    made = run(tmp_path / "frame", "-m", "pytest", "benchmarks", "-q")
    assert "12 passed" in made.stdout, made.stdout + made.stderr


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.exhaustive
def test_report_makes_the_tables(folder: Path) -> None:
    results = folder / "benchmarks" / "results"
    page = (results / "README.md").read_text()
    assert "torch" in page
    row = next(line for line in page.splitlines() if line.startswith("| medium"))
    assert "1.00 ms | 2.00× (promised 3×) | 4.00×" in row
    assert "* Liger-Kernel is not in the table: Liger-Kernel needs a GPU" in page
    assert "* medium (1 thread): told" in page
    docs = (folder / "docs" / "ops.md").read_text()
    assert docs.startswith("before\n<!-- measured: toy, nothing -->\n")
    assert docs.endswith("<!-- end -->\nafter\n")
    assert "old" not in docs
    assert "| medium | 1.00 ms | 2.00× (promised 3×) | 4.00× |" in docs
    assert "<!-- measured: nothing -->\n\nNot recorded yet.\n\n<!-- end -->" in docs
    assert run(folder, "-m", "benchmarks.report", "--check").returncode == 0
    (results / "README.md").write_text(page.replace("2.00×", "2.50×"))
    stale = run(folder, "-m", "benchmarks.report", "--check")
    assert stale.returncode == 1
    assert "README.md is not what the results say" in stale.stderr
    (results / "README.md").write_text(page)


@pytest.mark.exhaustive
def test_gate_fails_on_a_doctored_floor_and_skips_what_it_cannot_tell(folder: Path) -> None:
    text = (folder / "benchmarks" / "floors.toml").read_text()
    assert '"eager" = 1.7, "compile" = 3.4' in text
    head, rows = text.split("[[floor]]", 1)
    comment, machine = head.split("[[machine]]")
    here = machine.partition('name = "')[2].partition('"')[0]
    other = machine.replace(f'name = "{here}"', 'name = "other"').replace("cores = ", "cores = 1")
    doctored = f"{comment}[[machine]]{machine}[[machine]]{other}"
    entries = rows.split("[[floor]]")
    for entry in entries:
        others = entry.replace(f'machine = "{here}"', 'machine = "other"')
        changed = others if '"elsewhere"' in entry else entry
        doctored += "[[floor]]" + (changed.replace("1.7", "2.1") if '"large"' in entry else changed)
        # Floors of another machine, which nothing reaches, beside those of this one: they must not count.
        if '"small"' in entry:
            doctored += "[[floor]]" + others.replace("1.7", "99")
    # The record of the noise has no floor, as it should: here it gets one that its median does not reach.
    assert '"noise"' not in doctored
    small = next(entry for entry in entries if '"small"' in entry)
    noise = small.replace('"toy"', '"noise"').replace('"small"', '"any"').replace("1.7", "50")
    doctored += "\n[[floor]]" + noise
    (folder / "doctored.toml").write_text(doctored)
    gated = run(folder, "-m", "pytest", "benchmarks", "--gate", "--floors", "doctored.toml")
    out = gated.stdout
    assert gated.returncode == 1, out
    assert "2 passed, 4 skipped" in out.replace("1 failed, ", ""), out
    assert "toy large (1 thread): 2.00× eager, below 2.1×" in out
    assert "the times of eager scatter by" in out
    assert "other: recorded with cores 1" in out
    assert "recorded with 99 threads, but this process may use" in out
    assert "floors.toml has no floor for this row" in out


@pytest.mark.exhaustive
def test_short_gate_takes_one_small_and_one_medium_row_without_compilation(folder: Path) -> None:
    gated = run(folder, "-m", "pytest", "benchmarks", "--gate-short")
    assert gated.returncode == 0, gated.stdout
    table = gated.stdout.partition("speed-ups: median")[2]
    assert "toy small" in table
    assert "toy medium" in table
    assert "toy large" not in table
    assert "compile" not in table


@pytest.mark.exhaustive
def test_short_gate_on_a_machine_without_floors_skips_and_names_the_others(folder: Path) -> None:
    text = (folder / "benchmarks" / "floors.toml").read_text()
    (folder / "elsewhere.toml").write_text(text.replace("cores = ", "cores = 1"))
    gated = run(folder, "-m", "pytest", "benchmarks", "--gate-short", "--floors", "elsewhere.toml")
    assert gated.returncode == 0, gated.stdout
    assert "passed" not in gated.stdout
    name = text.partition('name = "')[2].partition('"')[0]
    assert f"{name}: recorded with cores 1" in gated.stdout


@pytest.mark.exhaustive
def test_gate_without_floors_is_an_error(folder: Path) -> None:
    gated = run(folder, "-m", "pytest", "benchmarks", "--gate", "--floors", "nowhere.toml")
    assert gated.returncode == 4
    assert "nowhere.toml holds no floors" in gated.stderr


KILLED = '''
"""The second row never comes to an end."""
import os
import signal

import harness


def test_one(benchmark):
    harness.compare(benchmark, "killed", "one", {"fedkern": lambda: 1.0, "eager": lambda: 2.0}, threads=1, pairs=3)


def test_two(benchmark):
    os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.mark.exhaustive
def test_a_killed_recording_leaves_what_it_had_and_a_forced_backend_is_noted(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "frame")
    (tmp_path / "frame" / "benchmarks" / "bench_toy.py").write_text(KILLED)
    killed = run(tmp_path / "frame", "-m", "pytest", "benchmarks", "--record", FEDKERN_BACKEND="reference")
    assert killed.returncode == -signal.SIGKILL
    (path,) = (tmp_path / "frame" / "benchmarks" / "results").glob("killed-*.json")
    assert path.stem.endswith("-reference")
    content = json.loads(path.read_text())
    (row,) = content["results"]
    assert (row["case"], row["backend"], row["core"]) == ("one", "reference", "")
    assert row["time"] >= content["machine"]["time"]
    assert content["machine"]["backend"] == "reference"


@pytest.mark.exhaustive
def test_a_test_that_is_named_leaves_the_rows_of_the_others(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "frame")
    one = run(tmp_path / "frame", "-m", "pytest", "benchmarks/bench_toy.py::test_toy[small]", "--record")
    assert one.returncode == 0, one.stdout + one.stderr
    (path,) = (tmp_path / "frame" / "benchmarks" / "results").glob("toy-*.json")
    assert [row["case"] for row in json.loads(path.read_text())["results"]] == ["medium", "large", "small"]


@pytest.mark.exhaustive
def test_rows_of_another_torch_stop_a_recording_before_it_measures(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "frame")
    for path in (tmp_path / "frame" / "benchmarks" / "results").glob("toy-*.json"):
        path.write_text(path.read_text().replace('"torch": "', '"torch": "1.'))
    command = ["-m", "pytest", "benchmarks", "--record", "-k", "small"]
    refused = run(tmp_path / "frame", *command)
    assert refused.returncode == 1
    assert "recorded with torch 1.2" in refused.stdout
    assert len(json.loads(path.read_text())["results"]) == 3
    assert run(tmp_path / "frame", *command, "--anew").returncode == 0
    assert [row["case"] for row in json.loads(path.read_text())["results"]] == ["small"]
    alone = run(tmp_path / "frame", "-m", "pytest", "benchmarks", "--anew")
    assert alone.returncode == 4
    assert "--anew says what --record does" in alone.stderr
