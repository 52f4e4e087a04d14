"""Benchmark of the strategies of fedkern.flower against Flower's own, on the same replies.

    python -m pytest benchmarks/bench_flower.py --environment flower=DIR [--record]

DIR is a virtual environment with flwr 1.41 or 1.42 and the packages that fedkern needs.  Time is from the first reply
to the new arrays, with all replies in memory.  Memory is the highest rise over a round whose replies come one after
another: Flower's grid collects them first.  See flower_replies.py, which that environment runs.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gate, harness, machines, sources
from benchmarks.comparisons import Comparison

HERE = Path(__file__).parent
OURS, THEIRS = "fedkern", "Flower"
# Rule, model, clients and bytes of a model.
CASES = (
    ("FedAvg", "ResNet-18", 10, 44_695_848),
    ("FedAvg", "CNN", 50, 4_005_416),
    ("FedAvg", "LeNet", 200, 248_024),
    ("FedAdam", "ResNet-18", 10, 44_695_848),
    ("FedMedian", "CNN", 10, 4_005_416),
    ("Krum", "CNN", 10, 4_005_416),
)
SECONDS = 600


def ask(task: str, rule: str, model: str, clients: int, *words: str) -> Any:
    """Return the answer of flower_replies.py, or skip the test without an environment."""
    folder = harness.SETTINGS.environments.get("flower")
    if folder is None:
        pytest.skip("no --environment flower=DIR was given")
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [str(folder / "bin" / "python"), str(HERE / "flower_replies.py"), task, rule, model, str(clients), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        pytest.fail(f"{' '.join(command[1:])}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}", pytrace=False)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}-{case[1]}")
def test_a_round(node: str, case: tuple[str, str, int, int], threads: int) -> None:
    rule, model, clients, size = case
    if threads > gate.usable_cpus():
        pytest.skip(f"{threads} threads, but this process may use {gate.usable_cpus()}")
    refusal = harness.SETTINGS.recorder.refusal("flower", "cpu") if harness.SETTINGS.recorder else ""
    if refusal:
        pytest.fail(refusal, pytrace=False)
    name = f"{rule} of {clients} × {model}"
    samples = ask("time", rule, model, clients, "--threads", str(threads), "--pairs", "11")
    measured, _ = harness.summarise(samples, OURS)
    peaks = {variant: ask("memory", rule, model, clients, "--variant", variant) for variant in samples}
    models = ", ".join(f"{variant} {rise / size:.1f}" for variant, rise in peaks.items())
    backend, core = machines.served_by("cpu")
    row = Comparison(
        group="flower", case=name, ours=OURS, threads=threads, **measured,
        model_bytes=(clients + 1) * size,
        note=f"peak memory in models: {models}", test=node, peak_bytes=peaks,
        time=machines.now(), sources=sources.behind(backend, core, "flower"), backend=backend,
    )  # fmt: skip
    harness.conclude(row)


def test_krum_ranks_small_updates() -> None:
    """Updates have a standard deviation of 1e-5 beside weights of 0.05, in 20 rounds of 10 clients."""
    wrong = ask("ranking", "Krum", "LeNet", 10, "--pairs", "20")
    print(f"Krum chose another client than fp64 in so many of 20 rounds: {wrong}")
    assert wrong[OURS] == 0
    assert wrong[THEIRS] > 0, "Flower ranks rightly here: the page's table of differences says otherwise"
