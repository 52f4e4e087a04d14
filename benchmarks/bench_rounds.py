"""Benchmark of rounds of FedAvg: fedkern's engine, a lean loop without a framework, and other frameworks.

    python -m pytest benchmarks/bench_rounds.py --rounds full --record [--data-root DIR] \
        [--environment flower=DIR] [--environment fluke=DIR] [--environment pfl=DIR] [--environment fedlab=DIR] \
        [--environment blazefl=DIR]

Every program plays the same rounds with the same network, first weights, images, order of samples and threads, and
trains its clients with the same function (rounds/task.py), but for fedkern and the lean loop, whose own training is
the subject.  A framework lives in a virtual environment of its own, which the command line names; one that is
not named, or fails, stands in the table with the reason.

A program is a process.  Programs take turns, and a speed-up is the median over their turns.  "A round" is the
median of a process's rounds without the first; the time from a round's beginning to the next one's counts, so that
it includes all work of a framework between rounds.  Nobody evaluates between rounds.  Memory, of all processes of a
program together, is measured in an earlier play, which is not timed.

With one thread serial programs meet: fedkern's serial engine, the lean loop, frameworks that train in one process.
With two, each takes two cores in its own way: two torch threads in one process, or two processes of one thread.

With ``--device cuda`` all of them train on the GPU, where one thread launches the kernels; of the frameworks Flower
alone, two clients side by side.

``--rounds small`` is a trial of everything at a small size.  Without ``--rounds`` the tests are skipped: they take
hours.

Rounds on Datasets as users write them, beside a loop around a DataLoader or the same images as fedkern's own data, need
nothing: ``-k datasets``.
"""

import math
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks import gate, harness, machines, sources
from benchmarks.baselines import Absent
from benchmarks.comparisons import Comparison
from benchmarks.rounds import setting
from benchmarks.rounds.datasets import CASES, OTHERS, Trial
from benchmarks.rounds.plays import Failed, Judged, Played, Program, play
from benchmarks.rounds.setting import Setting
from benchmarks.rounds.task import Task

# So many rounds that processes which start beside the first ones (two seconds) have come by the median one.
ROUNDS = {10: 30, 50: 15, 200: 5}
NETWORKS = (("lenet", 6), ("cnn", 8))
SMALL = tuple(
    Setting(*network, clients, rounds=rounds, repeats=3) for network in NETWORKS for clients, rounds in ROUNDS.items()
)
LARGE = (Setting("resnet8", 16, 10), Setting("resnet18", 64, 5, rounds=2, repeats=3))
OWN = tuple(Setting(name, 16, 10, rounds=19, repeats=3) for name in ("mcmahan", "own-resnet8", "own-resnet8-gn"))
ON_A_GPU = (Setting("resnet18", 64, 10, rounds=5, repeats=3),)
SETTINGS = (*SMALL, *LARGE, *OWN, *ON_A_GPU)
LIMIT = {"small": 300.0, "full": 3600.0}
LEAN = "lean loop"
# By name: the adapter, and whether it trains in processes; the others train in one.
FRAMEWORKS = {
    "Flower": ("flower", True),
    "BlazeFL": ("blazefl", True),
    "fluke": ("fluke", False),
    "pfl": ("pfl", False),
    "FedLab": ("fedlab", False),
}
SIDE_BY_SIDE = 2  # Flower's clients on a GPU
SIGMAS = 3.0  # by which accuracies may differ


def trial(full: Setting) -> Setting:
    """Return the same setting in little."""
    return replace(full, clients=min(full.clients, 4), samples=40, rounds=2, repeats=2)


def programs(threads: int, device: str = "cpu") -> tuple[str, dict[str, Program | Absent]]:
    """Return the programs for so many threads, or for a GPU, and the name of the judged one."""
    python = Path(sys.executable)
    entries: dict[str, Program | Absent] = {}
    names = {"fedkern serial": "1"}
    if threads > 1:
        names |= {"fedkern workers": str(threads), "fedkern auto": "auto"}
    for judged, workers in names.items():
        entries[judged] = Program(judged, "ours", python, threads, words=(workers,), device=device)
    entries[LEAN] = Program(LEAN, "lean", python, threads, device=device)
    for name, (adapter, processes) in FRAMEWORKS.items():
        folder = harness.SETTINGS.environments.get(adapter)
        if processes and threads == 1 and (device == "cpu" or name != "Flower"):
            continue
        if device != "cpu" and name != "Flower":
            entries[name] = Absent("its adapter trains on the CPU")
        elif folder is None:
            entries[name] = Absent(f"no --environment {adapter}=DIR was given")
        else:
            own_threads, worker_count = (1, threads if device == "cpu" else SIDE_BY_SIDE) if processes else (threads, 1)
            entries[name] = Program(name, adapter, folder / "bin" / "python", own_threads, worker_count, device=device)
    return judged, entries


def tolerance(accuracy: float, count: int = setting.TEST) -> float:
    """Return how much two accuracies on ``count`` test images may differ for networks that differ by rounding alone."""
    return SIGMAS * math.sqrt(2 * max(accuracy * (1 - accuracy), 1 / count) / count)


def unequal(accuracy: Mapping[str, float], against: str) -> dict[str, float]:
    """Return the programs whose accuracy is not that of ``against``, within the tolerance."""
    allowed = tolerance(accuracy[against])
    return {name: value for name, value in accuracy.items() if abs(value - accuracy[against]) > allowed}


def compete(
    playing: dict[str, Program], task: Judged, repeats: int, limit: float
) -> tuple[dict[str, list[Played]], dict[str, Played], dict[str, str]]:
    """Let programs take turns.

    Returns:
        their timed plays, as many of each; the play in which memory was measured; and why others have none.
    """
    watched: dict[str, Played] = {}
    why: dict[str, str] = {}
    for name, program in playing.items():
        try:
            watched[name] = play(program, task, watch=True, limit=limit)
        except Failed as failure:
            why[name] = f"it does not run here: {failure}"
    timed: dict[str, list[Played]] = {name: [] for name in watched}
    for turn in range(repeats):
        names = list(timed)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            try:
                timed[name].append(play(playing[name], task, limit=limit))
            except Failed as failure:
                del timed[name]
                why[name] = f"it failed in play {turn + 1}: {failure}"
    return timed, watched, why


def later(played: Played) -> float:
    """Return the median round behind the first."""
    return statistics.median(played.rounds[1:])


@pytest.mark.parametrize("case", SETTINGS, ids=lambda one: f"{one.model}-{one.clients}")
def test_rounds(node: str, case: Setting, threads: int) -> None:
    device = harness.SETTINGS.device
    if device == "cpu" and case in ON_A_GPU:
        pytest.skip("a setting of --device cuda")
    _check("rounds", threads)
    case = trial(case) if harness.SETTINGS.rounds == "small" else case
    judged, entries = programs(threads, device)
    data = "synthetic images" if harness.SETTINGS.data_root is None else "CIFAR-10"
    note = f"{data}, batches of {case.batch_size}, {case.epochs} epoch a round"
    with tempfile.TemporaryDirectory(prefix="task-") as folder:
        root = harness.SETTINGS.data_root
        setting.write(case, Path(folder), None if root is None else str(root))
        row = Row("rounds", case.case, node, threads, judged, LEAN, note)
        row.conclude(entries, Task.load(folder), case.repeats)


@pytest.mark.parametrize("kind", CASES)
def test_datasets(node: str, kind: str, threads: int) -> None:
    _check("datasets", threads)
    if harness.SETTINGS.device != "cpu" or threads > 1:
        pytest.skip("clients one after another on one core of a CPU")
    reference = "arrays" if "images" in kind else "loop"
    with tempfile.TemporaryDirectory(prefix="task-") as folder:
        trial = Trial.write(Path(folder), kind, small=harness.SETTINGS.rounds == "small")
        words = {"fedkern": "fedkern", OTHERS[reference]: reference}
        entries = {name: Program(name, "datasets", Path(sys.executable), words=(word,)) for name, word in words.items()}
        row = Row("datasets", trial.case, node, threads, "fedkern", OTHERS[reference], "batches of 32, 1 epoch a round")
        row.conclude(entries, trial, 2 if harness.SETTINGS.rounds == "small" else 5)


def _check(group: str, threads: int) -> None:
    """Skip or fail where whole runs are not to be played."""
    device = harness.SETTINGS.device
    if not harness.SETTINGS.rounds:
        pytest.skip("whole runs, for hours: asked for by --rounds full")
    if device != "cpu" and threads > 1:
        pytest.skip("on a GPU one thread launches the kernels")
    if threads > gate.usable_cpus():
        pytest.skip(f"{threads} threads, but this process may use {gate.usable_cpus()}")
    refusal = harness.SETTINGS.recorder.refusal(group, device) if harness.SETTINGS.recorder else ""
    if refusal:
        pytest.fail(refusal, pytrace=False)


@dataclass(frozen=True)
class Row:
    """Row of the table before anything is measured, where ``against`` names the program with the right accuracy."""

    group: str
    case: str
    node: str
    threads: int
    judged: str
    against: str
    note: str

    def conclude(self, entries: Mapping[str, Program | Absent], task: Judged, repeats: int) -> None:
        """Let programs take turns, compare their accuracies, and record the row."""
        missing = {name: program.reason for name, program in entries.items() if isinstance(program, Absent)}
        playing = {name: program for name, program in entries.items() if isinstance(program, Program)}
        timed, watched, why = compete(playing, task, repeats, LIMIT[harness.SETTINGS.rounds])
        if self.judged in why or self.against in why:
            pytest.fail("; ".join(f"{name}: {reason}" for name, reason in why.items()), pytrace=False)
        measured, _ = harness.summarise({n: [later(p) for p in plays] for n, plays in timed.items()}, self.judged)
        accuracy = {name: plays[-1].accuracy for name, plays in timed.items()}
        right = accuracy[self.against]
        if wrong := unequal(accuracy, self.against):
            accuracies = ", ".join(f"{name} {value:.4f}" for name, value in wrong.items())
            allowed = f"{right:.4f} ± {tolerance(right):.4f}"
            pytest.fail(f"{self.case}: {accuracies}, but the {self.against} {allowed}", pytrace=False)
        backend, core = machines.served_by(harness.SETTINGS.device)
        said = [f"{name}: {text}" for name, plays in timed.items() for text in plays[-1].said.values()]
        harness.conclude(
            Comparison(
                group=self.group,
                case=self.case,
                ours=self.judged,
                threads=self.threads,
                **measured,
                device=harness.SETTINGS.device,
                note="; ".join([self.note, *said]),
                test=self.node,
                peak_bytes={name: watched[name].peak or 0 for name in timed if watched[name].peak},
                missing=missing | why,
                time=machines.now(),
                sources=sources.behind(backend, core, self.group),
                backend=backend,
                startup_seconds={n: statistics.median(p.startup for p in plays) for n, plays in timed.items()},
                first_seconds={n: statistics.median(p.rounds[0] for p in plays) for n, plays in timed.items()},
                accuracy=accuracy,
            )
        )
