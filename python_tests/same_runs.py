"""Plays every method with two checkouts on this machine and tells where their runs differ.

    python python_tests/same_runs.py OLD NEW [--only WORD] [--keep DIR]

OLD and NEW are checkouts with their compiled core built in place.  Bits differ between processors, so both are played
here.  Every method in its smallest form runs in one process, in two workers, on two ranks of torchrun, on Flower's
nodes, and killed and resumed; wrong commands are given to both.  Compared are the files of the run folder and what is
in them without times, the events of a listener, warnings, exit codes and what is printed on errors.  Two costs are told
as ratios: the peak memory of a run, and the processor time of ``--help``.  The exit code is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODES = ("one process", "two workers", "two ranks", "flower", "resumed")
VOLATILE = {"seconds", "round_seconds", "phases", "device", "wire", "time", "commit", "torchrun", "run", "out"}
SUMS = {"files", "sum", "metrics_sha256", "shown_sha256", "metrics_bytes", "results"}  # of files that hold times
UNREAD = {".png", ".html", ".lock"}  # pictures hold no figure that the other files have not
SETTINGS = {
    "data": "digits", "clients": 3, "train_samples": 60, "width": 2, "rounds": 2, "local_epochs": 1, "batch_size": 8,
    "grad_cam": 0, "threads": 1, "client_threads": 1, "device": "cpu",
}  # fmt: skip
OWN = {
    "feddra": {"data": "captions", "train_samples": 80, "clients": None, "local_epochs": None},
    "fedgid": {"data": "colordigits"},
    "fedlpfm": {"public_samples": 20, "partition": "iid"},
    "fml": {"partition": "iid"},
    "feddf": {"public_samples": 20, "partition": "iid", "rounds": None},
    **{name: {"rounds": None} for name in ("ccvr", "dense", "ensemble", "fusefl", "oneshot-fedavg")},
}
WRONG = (
    "fedavgg", "fedavg --rounds 0", "fedavg --roundz 2", "fedavg --data nowhere", "fedavg --partition dirichlet",
    "fedavg --method-option lam=1", "fusefl --rounds 3", "feddra --data digits", "fedavg --resume nowhere",
    "fedavg --aggregator krum:byzantine=9", "fedavg --dp-noise 1", "fediod --dp-clip 1", "evaluate nowhere",
    "compare fedavg --seeds 0", "fedavg --on-nan perhaps", "fedavg --model python:nowhere:Net",
    "predict nowhere nothing.png",
)  # fmt: skip
PLAYER = '''
import json, os, signal, sys
import fedkern
from fedkern.listeners import Listener

class Log(Listener):
    """Writes every event down; kills the process at the second round where it is asked to."""
    def __init__(self, path, kill):
        self.path, self.kill = path, kill
    def tell(self, *event):
        with open(self.path, "a") as file:
            file.write(json.dumps(event, default=str) + "\\n")
    def on_start(self, run): self.tell("start", run.rounds, run.first_round)
    def on_notice(self, text): self.tell("notice", text)
    def on_client(self, round, client, info): self.tell("client", round, client, info)
    def on_round(self, record): self.tell("round", record)
    def on_warning(self, name, text): self.tell("warning", name, text)
    def on_end(self, summary): self.tell("end", summary)
    def on_round_start(self, round, name, participants):
        self.tell("begin", round, name, list(participants))
        if self.kill and round == 2:
            os.kill(os.getpid(), signal.SIGKILL)

method, settings, kill, out = json.loads(sys.argv[1])
listener = Log(out + ".events.jsonl", kill)
if kill is None:
    fedkern.load(out).resume(listener=listener)
else:
    fedkern.simulate(method, out=out, listener=listener, progress=False, **settings)
'''
FLOWER = """
import json, sys
from node_grid import NodeGrid
from fedkern.flower import server_app
settings, clients, out = json.loads(sys.argv[1])
settings = {**settings, "flower.wait": 0.0, "out": out}
server_app.play(NodeGrid(settings, range(clients)), settings)
"""


class Checkout:
    """One of the two, and where its runs lie."""

    def __init__(self, folder: Path, runs: Path) -> None:
        self.folder, self.runs = folder.resolve(), runs
        runs.mkdir(parents=True)

    def python(self, *words: str, out: str = "") -> tuple[int, str, int]:
        """Exit code, standard error and peak memory in bytes of a Python process of this checkout."""
        tests = self.folder / "python_tests"
        path = os.pathsep.join(map(str, (self.folder, tests, tests / "flower")))
        environment = {
            **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1",
            "XDG_CACHE_HOME": str(self.runs / "cache" / (out or "commands")),
        }  # fmt: skip
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=self.runs, env=environment, stdout=subprocess.DEVNULL, stderr=said
            )
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            return process.returncode, said.read().replace(str(self.folder), "CHECKOUT"), 1024 * used.ru_maxrss

    def run(self, method: str, mode: str) -> tuple[dict[str, Any], int]:
        """All that the run left behind, by name, and its peak memory."""
        out = f"{method}-{mode.replace(' ', '-')}"
        given = settings_of(method)
        words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "options"]
        words += [f"--method-option={name}={value}" for name, value in given.get("options", {}).items()]
        if mode == "two ranks":
            ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            codes = [self.python(*ranks, "-m", "fedkern.run", method, *words, "--quiet", "--out", out, out=out)]
        elif mode == "flower":
            flower = {name.replace("_", "-"): value for name, value in given.items() if name != "options"}
            flower |= {f"method-option.{name}": value for name, value in given.get("options", {}).items()}
            sent = json.dumps([{"method": method, **flower}, 4 if method == "feddra" else 3, out])
            codes = [self.python("-c", FLOWER, sent, out=out)]
        else:
            given["workers"] = 2 if mode == "two workers" else 1
            kills = [True, None] if mode == "resumed" else [False]
            codes = [self.python("-c", PLAYER, json.dumps([method, given, kill, out]), out=out) for kill in kills]
        left: dict[str, Any] = {"exit codes": [code for code, _, _ in codes]}
        if codes[-1][0]:
            left["error"] = next((line for line in codes[-1][1].splitlines()[::-1] if "Error: " in line), codes[-1][1])
        files = [path for path in (self.runs / out).rglob("*") if path.is_file()]
        left["files"] = sorted(str(path.relative_to(self.runs / out)) for path in files)
        for path in (*files, self.runs / f"{out}.events.jsonl"):
            if path.exists() and path.suffix not in UNREAD:
                left[path.name] = content(path)
        return left, max(memory for _, _, memory in codes)


def settings_of(method: str) -> dict[str, Any]:
    """The smallest form of a method, as keyword arguments of ``fedkern.simulate``."""
    from smallest import SETTINGS as smallest

    given = {**SETTINGS, **smallest.get(method, {}), **OWN.get(method, {})}
    return {name: value for name, value in given.items() if value is not None}


def content(path: Path) -> Any:
    """What a file says, without times and what follows from them."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = {
            name: (str(value.dtype), list(value.shape), value.numpy()) for name, value in load_file(path).items()
        }
        return {name: (*form, hashlib.sha256(value.tobytes()).hexdigest()) for name, (*form, value) in tensors.items()}
    if path.name == "manifest.json":  # its form may change: resumed runs show that it serves
        entries = json.loads(path.read_text())["entries"]
        return [timeless({name: value for name, value in entry.items() if name != "info"}) for entry in entries]
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_text(errors="replace")


def timeless(value: Any) -> Any:
    """A JSON value without the entries that no two runs have alike."""
    if isinstance(value, dict):
        return {name: timeless(each) for name, each in value.items() if name not in VOLATILE | SUMS}
    if isinstance(value, list):
        return [timeless(each) for each in value]
    return value


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, one line for each place."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}, key=str):
            if name not in old or name not in new:
                yield f"{where}/{name} is only in {'OLD' if name in old else 'NEW'}"
            else:
                yield from differences(old[name], new[name], f"{where}/{name}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{where}/{index}")
    elif old != new:
        yield f"{where}: {str(old)[:200]} in OLD, {str(new)[:200]} in NEW"


def help_seconds(checkout: Checkout) -> float:
    """Processor seconds of ``--help``."""
    before = os.times()
    checkout.python("-m", "fedkern.run", "--help")
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", default="", help="runs and commands whose name holds this word")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs, which are deleted otherwise")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch) / "runs"
        sides = [Checkout(given.old, folder / "old"), Checkout(given.new, folder / "new")]
        listed = subprocess.run(
            [sys.executable, "-c", "from fedkern.methods import METHODS; print(*sorted(METHODS))"],
            env={**os.environ, "PYTHONPATH": str(sides[0].folder)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        cases = [(method, mode) for method in listed.stdout.split() for mode in MODES]
        different, peaks = 0, []
        begin = time.monotonic()
        for method, mode in cases:
            if given.only in f"{method}, {mode}":
                (old, memory), (new, more) = (side.run(method, mode) for side in sides)
                peaks.append(more / memory)
                lines = list(differences(old, new))
                error = "" if lines else new.get("error", "")
                if error and "UserError" not in error:
                    lines = [f"both end in {error}"]
                different += bool(lines)
                print(f"{method}, {mode}: {'differs' if lines else f'same: {error}' if error else 'same'}", flush=True)
                print(*(f"    {line}" for line in lines[:10]), sep="\n", end="\n" if lines else "", flush=True)
        for wrong in WRONG:
            if given.only in wrong:
                old, new = (side.python("-m", "fedkern.run", *wrong.split())[:2] for side in sides)
                same = old == new and old[0] == 2
                different += not same
                print(f"{wrong}: {'same' if same else f'differs: {old} in OLD, {new} in NEW'}", flush=True)
        if peaks:
            print(f"peak memory: {statistics.median(peaks):.3f} of OLD's (median), {max(peaks):.3f} at most")
        seconds = [[help_seconds(side) for side in sides] for _ in range(5)]
        print(f"--help: {statistics.median(new / old for old, new in seconds):.2f} of OLD's processor time")
        print(f"{different} differ, in {time.monotonic() - begin:.0f} s")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
