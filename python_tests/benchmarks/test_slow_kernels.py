"""Tests of the gate on real kernels: it fails for one slowed by 30 %, on a quiet machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gate, machines
from benchmarks.comparisons import machine_difference

ROOT = Path(__file__).parents[2]
TRIES = 3
PLUGIN = """
import time

from benchmarks import harness


def pytest_sessionstart():
    duel = harness._duel

    def slowed_duel(runs, ours, against, threads):
        clock, run = time.thread_time if threads == 1 else time.perf_counter, runs[ours]
        begin = clock()
        for _ in range(1000):
            clock()
        reading = (clock() - begin) / 1001  # looking at the clock takes a part of what is to be waited

        def slowed():
            begin = clock()
            run()
            end = begin + 1.3 * (clock() - begin - reading) - reading
            while clock() < end:
                pass

        return duel({**runs, ours: slowed}, ours, against, threads)

    harness._duel = slowed_duel
"""
FLOORS = gate.read_floors()


def steadiest_of_each_family() -> list[str]:
    """Return from every benchmark file the gated row with the least spread between processes."""
    rows = sorted(FLOORS.rows, key=lambda node: min(FLOORS.rows[node].ratios) / max(FLOORS.rows[node].ratios))
    return sorted({node.partition("::")[0]: node for node in rows if FLOORS.rows[node].can_hold}.values())


def run_gate(node: str, slowed: bool, path: Path) -> subprocess.CompletedProcess[str]:
    """Run the gate over one row in a process of its own.

    The processes that it starts load the plugin too.
    """
    command = [sys.executable, "-m", "pytest", "--gate-short", "-p", "no:cacheprovider", f"benchmarks/{node}"]
    plugin = {"PYTEST_ADDOPTS": "-p slowed_kernels"} if slowed else {}
    environment = {**os.environ, "PYTHONPATH": str(path), **plugin}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("node", steadiest_of_each_family())
def test_a_kernel_that_takes_30_per_cent_longer_fails_in_three_of_three_tries(node: str, tmp_path: Path) -> None:
    if difference := machine_difference(FLOORS.machine, machines.machine("cpu")):
        pytest.skip(f"floors.toml was {difference}")
    (tmp_path / "slowed_kernels.py").write_text(PLUGIN)
    sound = run_gate(node, slowed=False, path=tmp_path)
    assert (sound.returncode, "1 passed" in sound.stdout) == (0, True), sound.stdout
    for _ in range(TRIES):
        slowed = run_gate(node, slowed=True, path=tmp_path)
        if "1 skipped" in slowed.stdout:
            pytest.skip("the gate cannot tell: the machine is not quiet, or not as fast as where its floors were seen")
        assert slowed.returncode == 1, slowed.stdout
        assert f"{node}: " in slowed.stdout, slowed.stdout
        assert "1 failed" in slowed.stdout
