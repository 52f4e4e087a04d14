"""Rounds of FedAvg with fedkern's engine beside the lean loop, or one round of the engine under PyTorch's profiler.

python -m benchmarks.gpu.beside MODEL WIDTH CLIENTS ROUNDS --out DIR [--traced]

The task is that of bench_rounds.py, played once by each.  DIR gets ``MODEL.json``: the first round, the median of
the later ones and the accuracy; or, traced, the files of ``benchmarks.gpu.trace``.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import trace
from benchmarks.rounds import ours, plays, setting
from benchmarks.rounds.plays import Program
from benchmarks.rounds.setting import Setting
from benchmarks.rounds.task import DEVICE, Task
from fedkern.engine.run import run
from fedkern.engine.store.run_folder import TRACE

OURS, LEAN = "fedkern", "lean loop"


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.beside", description=__doc__)
    parser.add_argument("model")
    for name in ("width", "clients", "rounds"):
        parser.add_argument(name, type=int)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--traced", action="store_true")
    args = parser.parse_args(words)
    os.environ[DEVICE] = args.device
    args.out.mkdir(parents=True, exist_ok=True)
    case = Setting(args.model, args.width, args.clients, rounds=args.rounds)
    with tempfile.TemporaryDirectory(prefix="task-") as folder:
        setting.write(case, Path(folder))
        task = Task.load(folder)
        if args.traced:
            print(trace_rounds(case, task, args.out))
            return 0
        facts = {"case": case.case, **contest(task, args.device)}
    (args.out / f"{args.model}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(describe(facts))
    return 0


def contest(task: Task, device: str) -> dict[str, dict[str, float]]:
    """Return seconds of the first round, the median of the later ones, and the accuracy, of each."""
    facts: dict[str, dict[str, float]] = {"first": {}, "later": {}, "accuracy": {}}
    for name, adapter, *arguments in ((LEAN, "lean"), (OURS, "ours", "1")):
        program = Program(name, adapter, Path(sys.executable), words=tuple(arguments), device=device)
        played = plays.play(program, task)
        facts["first"][name] = played.rounds[0]
        facts["later"][name] = statistics.median(played.rounds[1:])
        facts["accuracy"][name] = played.accuracy
    return facts


def trace_rounds(case: Setting, task: Task, out: Path) -> str:
    """Play two rounds in this process, the second under the profiler, and return the trace's figures in one line."""
    setting.register(case.model)
    shutil.rmtree(out / "run", ignore_errors=True)  # what an end of time has left of an earlier one
    run(ours.settings(task, 1, "1"), out=out / "run", data=ours.federated_data(task), profile=True)
    return trace.conclude(case.case, [], out / "run" / TRACE, out)


def describe(facts: dict[str, Any]) -> str:
    """Return the figures in one line."""
    figures = ", ".join(
        f"{name} {1e3 * facts['first'][name]:.0f} ms and {1e3 * seconds:.1f} ms ({100 * facts['accuracy'][name]:.1f} %)"
        for name, seconds in facts["later"].items()
    )
    gain = facts["later"][LEAN] / facts["later"][OURS]
    return f"{facts['case']}, first round and median of later ones: {figures}, {gain:.2f}×"


if __name__ == "__main__":
    sys.exit(main())
