"""The benchmarks' command line from recording to the gate, on a toy benchmark with simulated times."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"

TOY = '''
"""Implementations that return their own duration; ours is as much slower as SLOWER says."""
import os

from benchmarks import gate
from benchmarks import harness
import pytest
from benchmarks import shown
from benchmarks import timing
from benchmarks.baselines import Absent

SLOWER = float(os.environ.get("SLOWER", "1"))
shown.SHOWN = {f"bench_toy.py::test_toy[{size}": shown.Shown("", size) for size in ("small", "large", "lasting")}
shown.SHOWN["bench_toy.py::test_noise[any"] = shown.Shown("", "")


class Told:
    def sample(self, run, count):
        said = run()
        return said if isinstance(said, float) else 1e-6  # the copy among them says nothing

    def wall(self, run, count):
        return None


timing.clock = lambda device, **kind: Told()
gate.PAUSE, gate.PROCESSES = 0.0, 2
gate.Others.share = lambda self: float(os.environ.get("OTHERS", "0"))  # of what is told no other process takes a part


@pytest.mark.parametrize("size", ["small", "large", "lasting"])
def test_toy(node, size, threads):
    seconds = {"small": 1e-4, "large": 1e-2, "lasting": 1.0}[size] / threads
    runs = {
        "fedkern": lambda: SLOWER * seconds,
        "eager": lambda: 2 * seconds,
        "compile": lambda: 4 * seconds,
        "Liger-Kernel": Absent("Liger-Kernel needs a GPU"),
    }
    harness.compare(node, "toy", size, runs, model_bytes=8000, copy=True, threads=threads, note="told")


@pytest.mark.parametrize("size", ["any"])
def test_noise(node, size, threads):
    times = [1e-3, 9e-3] * 1000
    harness.compare(node, "noise", "any", {"fedkern": lambda: 1e-3, "eager": times.pop}, threads=threads)

'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the frame around the toy, recorded, with floors."""
    folder = tmp_path_factory.mktemp("frame")
    (folder / "benchmarks").mkdir()
    for path in HERE.glob("*.py"):
        if not path.name.startswith("bench_"):
            shutil.copy(path, folder / "benchmarks")
    (folder / "benchmarks" / "bench_toy.py").write_text(TOY)
    (folder / "pytest.ini").write_text(
        "[pytest]\npythonpath = benchmarks\npython_files = bench_*.py\naddopts = --import-mode=importlib -ra\n"
    )
    for arguments in (("--record",), ("--set-floors",)):
        made = run(folder, "-m", "pytest", "benchmarks", *arguments)
        assert made.returncode == 0, made.stdout + made.stderr
    assert run(folder, "-m", "benchmarks.report").returncode == 0
    return folder


COMPILED = '''
"""Twelve shapes of one function, more than torch.compile compiles before it gives up in silence."""
from benchmarks import harness
import pytest
import torch

BUILT = []


def counting(graph, inputs):
    BUILT.append(inputs)
    return graph.forward


def double(x):
    return x * 2


@pytest.mark.parametrize("rows", range(1, 13))
def test_shape(node, rows):
    compiled, x, before = torch.compile(double, backend=counting, dynamic=False), torch.ones(rows), len(BUILT)
    implementations = {"fedkern": lambda: x * 2, "compile": lambda: compiled(x)}
    harness.compare(node, "compiled", str(rows), implementations, pairs=3)
    assert len(BUILT) > before
'''


def test_every_shape_is_compiled(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "frame")
    (tmp_path / "frame" / "benchmarks" / "bench_toy.py").write_text(COMPILED)
    made = run(tmp_path / "frame", "-m", "pytest", "benchmarks", "-q")
    assert "12 passed" in made.stdout, made.stdout + made.stderr


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_report_makes_the_tables(folder: Path) -> None:
    results = folder / "benchmarks" / "results"
    page = (results / "README.md").read_text()
    assert "torch" in page
    row = next(line for line in page.splitlines() if line.startswith("| large"))
    assert "10.0 ms | 2.00× | 4.00×" in row
    assert "* Liger-Kernel is not in the table: Liger-Kernel needs a GPU" in page
    assert re.search(r"^\* .*\blarge \(1 thread\).*: told$", page, re.MULTILINE)
    assert run(folder, "-m", "benchmarks.report", "--check").returncode == 0
    (results / "README.md").write_text(page.replace("2.00×", "2.50×"))
    stale = run(folder, "-m", "benchmarks.report", "--check")
    assert stale.returncode == 1
    assert "README.md is not what the results say" in stale.stderr
    (results / "README.md").write_text(page)


@pytest.mark.parametrize(
    ("slower", "load", "outcome"), [("1.2", "0", "4 passed"), ("1.3", "0", "4 failed"), ("1.3", "0.5", "4 skipped")]
)
def test_the_gate_fails_where_a_kernel_takes_30_percent_longer(folder, slower, load, outcome):
    """The gate measures with one thread and with two, and skips where other processes compute."""
    gated = run(folder, "-m", "pytest", "benchmarks", "--gate-short", SLOWER=slower, OTHERS=load)
    assert gated.returncode == ("failed" in outcome), gated.stdout
    assert outcome in gated.stdout.splitlines()[-1]
    assert (gated.stdout.count("1.54× eager, below 1.64×") > 0) == (slower == "1.3")
    table = gated.stdout.partition("speed-ups: median")[2]
    assert "test_toy[small-1]" in table
    assert "lasting" not in table
    assert "noise" not in table
