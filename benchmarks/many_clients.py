"""Runs with 10,000 clients of which 1 % work in a round: start, rounds, memory, descriptors and files over the rounds.

    python -m benchmarks.many_clients --data-root DIR            # writes results/many_clients_<cpu>.json
    python -m benchmarks.many_clients --data-root DIR --rounds 100 --dry

DIR holds MNIST's four IDX files.  Every run is a process of its own, whose clients work in that process.  Seconds and
bytes of a row are means over the rounds since the row before, so that they include writes in the background.
Processor seconds do not depend on the machine's other work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import comparisons, machines
from fedkern.engine.run import run as play
from fedkern.listeners import Listener
from fedkern.settings.config import RunConfig

METHODS = ("fedavg", "scaffold")
CLIENTS, FRACTION, ROUNDS = 10_000, 0.01, 1000
MARKS = (10, 100, 250, 500, 1000)
SETTINGS: Mapping[str, Any] = {
    "data": "mnist", "clients": CLIENTS, "partition": "iid", "sample_fraction": FRACTION, "model": "cnn", "width": 8,
    "local_epochs": 1, "batch_size": 10, "eval_every": 50, "grad_cam": 0, "threads": 1, "workers": "1", "seed": 0,
    "device": "cpu",
}  # fmt: skip


def results_path(machine: Mapping[str, Any], folder: Path = comparisons.RESULTS) -> Path:
    """Return the file with the results of a machine."""
    return folder / f"many_clients_{comparisons.slug(machine)}.json"


class Meter(Listener):
    """Listener that measures the run at some of its rounds.

    Args:
        out: the run folder.
        since: ``time.time()`` when the process was started.
        marks: rounds after which measures are taken.
    """

    essential = True

    def __init__(self, out: Path, since: float, marks: Sequence[int]) -> None:
        self._out, self._since, self._marks = out, since, marks
        self._last, self._used, self._round, self._written = 0.0, 0.0, 0, 0
        self.start, self.start_cpu = 0.0, 0.0
        self.rows: list[dict[str, float]] = []

    def on_round_start(self, round: int, name: str, participants: Sequence[int]) -> None:
        if not self.start:
            self.start = time.time() - self._since
            self.start_cpu = time.process_time()
            self._last, self._used, self._written = time.perf_counter(), time.process_time(), _count_written()

    def on_round(self, record: Mapping[str, Any]) -> None:
        number = int(record["round"])
        if number not in self._marks:
            return
        rounds, written = number - self._round, _count_written()
        files = [path.stat().st_size for path in self._out.rglob("*") if path.is_file()]
        self.rows.append(
            {
                "round": number,
                "round_seconds": (time.perf_counter() - self._last) / rounds,
                "cpu_seconds": (time.process_time() - self._used) / rounds,
                "resident_bytes": _resident(),
                "descriptors": len(list(Path("/proc/self/fd").iterdir())),
                "written_bytes": (written - self._written) / rounds,
                "files": len(files),
                "folder_bytes": sum(files),
            }
        )
        self._last, self._used, self._round, self._written = time.perf_counter(), time.process_time(), number, written


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _count_written() -> int:
    """Return the bytes that this process has handed to the system to write."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("wchar")))


def measure(method: str, root: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Return a run's measures, from a process of its own.

    Args:
        method: the run's method.
        root: folder of MNIST's files.
        rounds: rounds of the run.
        folder: where the run folder goes.
    """
    asked = json.dumps({"method": method, "root": root, "rounds": rounds, "out": str(folder), "since": time.time()})
    command = [sys.executable, "-m", "benchmarks.many_clients", "--play", asked]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _play(asked: Mapping[str, Any]) -> None:
    out = Path(asked["out"])
    config = RunConfig.make(asked["method"], **{**SETTINGS, "data_root": asked["root"], "rounds": asked["rounds"]})
    meter = Meter(out, asked["since"], [*MARKS, asked["rounds"]])
    summary = play(config, out=out, listener=meter)
    figures = {"start_seconds": meter.start, "start_cpu_seconds": meter.start_cpu, "seconds": summary["seconds"]}
    print(json.dumps({**figures, "rounds": meter.rows}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_clients", description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="folder of MNIST's four IDX files")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dry", action="store_true", help="write no results, print them")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.play is not None:
        _play(json.loads(args.play))
        return 0
    if args.data_root is None:
        parser.error("--data-root is needed")
    runs = {}
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            runs[method] = measure(method, args.data_root, args.rounds, Path(folder) / "run")
        print(method, json.dumps(runs[method], indent=1), flush=True)
    if not args.dry:
        machine = machines.machine("cpu")
        content = {"machine": machine, "settings": dict(SETTINGS), "runs": runs}
        results_path(machine).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
