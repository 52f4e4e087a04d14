"""Comparison of two checkouts: every method on every task on this machine, and where the runs differ.

    python -m python_tests.same_runs OLD NEW [--only WORDS] [--modes MODE...] [--keep DIR]
    python -m python_tests.same_runs OLD NEW --only "fedavg, segmentation" --modes "one process" resumed

OLD and NEW are checkouts with their compiled core built in place.  Bits differ between processors, so both are played
here.  Every method in its smallest form runs in one process, in two workers, on two ranks of torchrun, on Flower's
nodes, and killed and resumed; wrong commands are given to both.  Three methods train on users' data sets, which ranks
and nodes do not take.  The comparison covers the files of the run folder and their contents without times, the events
of a listener, warnings, exit codes and the printed errors.  ``config.toml`` may gain the settings and method options of
`ADDED`.  A task that a method has lost counts as a difference, one that it has gained is named and not played.  Two
costs are printed as ratios: the peak memory of a run, and the processor time of ``--help``.  The exit code is 1 where
anything differs.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

MODES = ("one process", "two workers", "two ranks", "flower", "resumed", "commands")
VOLATILE = {"seconds", "round_seconds", "phases", "device", "wire", "time", "commit", "torchrun", "run", "out"}
SUMS = {"files", "sum", "metrics_sha256", "shown_sha256", "metrics_bytes", "results"}  # of files that hold times
UNREAD = {".png", ".html"}  # pictures hold no figure that the other files have not
SETTINGS: dict[str, Any] = {
    "clients": 3, "train_samples": 60, "width": 2, "rounds": 2, "local_epochs": 1, "batch_size": 8,
    "grad_cam": 0, "threads": 1, "client_threads": 1, "device": "cpu",
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"data": "digits"},
    "multilabel": {"data": "csv", "train_samples": None},
    "segmentation": {"data": "segdigits", "model": "unet-small", "client_test": 0.2},
    "retrieval": {"data": "captions", "train_samples": 80, "clients": None, "width": 4},
}
NETWORKS: dict[str, dict[str, Any]] = {  # a user's own, modules in a row and a function, for averaging methods
    name: {"data": "digits", "model": f"own_networks:{kind}", "width": None}
    for name, kind in (("rows", "Staged"), ("function", "Whole"))
}
DATASETS: dict[str, dict[str, Any]] = {  # a user's own, for averaging methods with and without state
    name: {
        "data": f"own_data:{name}", "model": f"own_data:{network}", "width": None, "train_samples": None,
        "clients": clients,
    }
    for name, network, clients in (("table", "Rows", None), ("text", "Words", None), ("images", "Pixels", 3))
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {  # of a method, and of a method on a task
    "feddra": {"local_epochs": None},
    "fedgid": {"data": "colordigits"},
    "fedlpfm": {"public_samples": 20, "partition": "iid"},
    "fml": {"partition": "iid"},
    "feddf": {"public_samples": 20, "partition": "iid", "rounds": None},
    **{name: {"rounds": None} for name in ("ccvr", "dense", "ensemble", "fedcgs", "fusefl", "oneshot-fedavg")},
    "ensemble, segmentation": {"options": {"models": "unet-small:2,unet-small:3"}},
    "feddf, segmentation": {"options": {"distill_batch": 4, "distill_epochs": 2}},
    "scaffold, retrieval": {"options": {"control": "II"}},
}
WRONG = (
    "fedavgg", "fedavg --rounds 0", "fedavg --roundz 2", "fedavg --data nowhere", "fedavg --partition dirichlet",
    "fedavg --method-option lam=1", "fusefl --rounds 3", "feddra --data digits", "fedavg --resume nowhere",
    "fedavg --aggregator krum:byzantine=9", "fedavg --dp-noise 1", "fediod --dp-clip 1", "evaluate nowhere",
    "compare fedavg --seeds 0", "fedavg --on-nan perhaps", "fedavg --model nowhere:Net",
    "predict nowhere nothing.png",
)  # fmt: skip
ADDED = {"optimizer_state", "init_partial", "accelerate", "class_weights", "intervene", "loss_samples", "keep_items"}
"""What config.toml may have only in NEW."""
SERVED = """
import json, sys
from fedkern.methods import METHODS
from fedkern.tasks import TASKS
pairs = [[name, task] for name in METHODS for task in sys.argv[1:] if METHODS[name].serves(TASKS[task])]
print(json.dumps([pair for pair in pairs if pair != ["fedlora", "segmentation"]]))  # a U-Net has no linear layers
"""
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
    if ":" in settings["data"]:  # a run folder may not name code alone
        from fedkern.run import main
        named = ["--data", settings["data"], "--model", settings["model"]]
        sys.exit(main(["--resume", out, *named, "--quiet"]))
    fedkern.load(out, trusted=[settings.get("model", "")]).resume(listener=listener)
else:
    fedkern.simulate(method, out=out, listener=listener, progress=False, **settings)
'''
FLOWER = """
import json, sys
from python_tests.flower.node_grid import NodeGrid
from fedkern.flower.runs import server_app
settings, pairs, out = json.loads(sys.argv[1])
settings = {**settings, "flower.wait": 0.0, "out": out}
# Captions are drawn anew by every new node, which takes seconds: theirs stay.  One of five clients has no node.
server_app.play(NodeGrid(settings, range(4 if pairs else 3), lives=pairs), settings)
"""


class Checkout:
    """One of the two checkouts, and the folder of its runs."""

    def __init__(self, folder: Path, runs: Path) -> None:
        self.folder, self.runs = folder.resolve(), runs.resolve()
        runs.mkdir(parents=True)

    def list_served(self) -> set[tuple[str, str]]:
        """Return pairs of a method and a task that it serves."""
        listed = subprocess.run(
            [sys.executable, "-P", "-c", SERVED, *TASKS], env={**os.environ, "PYTHONPATH": str(self.folder)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return {(method, task) for method, task in json.loads(listed.stdout)}

    def python(self, *words: str, out: str = "") -> tuple[int, str, int]:
        """Return exit code, standard error and peak memory in bytes of a Python process of this checkout."""
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

    def run(self, method: str, task: str, mode: str) -> tuple[dict[str, Any], int]:
        """Return all traces of a run, by name, and its peak memory."""
        out = f"{method}-{task}-{mode.replace(' ', '-')}"
        given = settings_of(method, task)
        if task == "multilabel":
            given["data_root"] = str(self.runs.parent / "labels.csv")
        words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "options"]
        words += [f"--method-option={name}={value}" for name, value in given.get("options", {}).items()]
        if mode == "two ranks":
            ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            codes = [self.python(*ranks, "-m", "fedkern.run", method, *words, "--quiet", "--out", out, out=out)]
        elif mode == "flower":
            flower = {name.replace("_", "-"): value for name, value in given.items() if name != "options"}
            flower |= {f"method-option.{name}": value for name, value in given.get("options", {}).items()}
            sent = json.dumps([{"method": method, **flower}, task == "retrieval", out])
            codes = [self.python("-c", FLOWER, sent, out=out)]
        else:
            given["workers"] = 2 if mode == "two workers" else 1
            kills = [True, None] if mode == "resumed" else [False]
            codes = [self.python("-c", PLAYER, json.dumps([method, given, kill, out]), out=out) for kill in kills]
        left: dict[str, Any] = {"exit codes": [code for code, _, _ in codes], "error": ""}
        if codes[-1][0]:
            left["error"] = next((line for line in codes[-1][1].splitlines()[::-1] if "Error: " in line), codes[-1][1])
        found = (self.runs / out).rglob("*")  # a killed run leaves what it was writing
        files = {str(path.relative_to(self.runs / out)): path for path in found if not path.name.startswith(".tmp")}
        files["events"] = self.runs / f"{out}.events.jsonl"
        for name, path in files.items():
            if path.is_file() and not path.match("checkpoints/clients-*.jsonl"):  # of the form of the manifest
                unread = path.suffix in UNREAD or path.name == ".lock"
                left[name] = None if unread else without_folder(content(path), str(self.folder))
        return left, max(memory for _, _, memory in codes)


def settings_of(method: str, task: str) -> dict[str, Any]:
    """Return the smallest form of a method on a task, as keyword arguments of ``fedkern.simulate``."""
    from python_tests import smallest

    own = {**smallest.SETTINGS.get(method, {}), **OWN.get(method, {}), **OWN.get(f"{method}, {task}", {})}
    given = {**SETTINGS, **(TASKS | NETWORKS | DATASETS)[task], **own}
    return {name: value for name, value in given.items() if value is not None}


def write_labels(table: Path) -> None:
    """Write a table of 60 images with a bright corner per label: none, one or two of three, at three sites."""
    rows = ["path,labels,client"]
    names = ("left", "right", "low")
    (table.parent / "images").mkdir(parents=True)
    for number in range(60):
        pixels = np.random.default_rng(number).integers(0, 100, (16, 16, 3), dtype=np.uint8)
        shown = [at for at in range(3) if number % 7 in (at, at + 1, at + 4)]
        for at in shown:
            pixels[8 * (at // 2) :, 8 * (at % 2) :][:8, :8] += 150
        Image.fromarray(pixels).save(table.parent / "images" / f"{number}.png")
        rows.append(f"images/{number}.png,{'|'.join(names[at] for at in shown)},{'ABC'[number % 3]}")
    table.write_text("\n".join(rows))


def content(path: Path) -> Any:
    """Return a file's contents, without times and their consequences."""
    if path.suffix == ".safetensors":
        with safe_open(path, "numpy") as file:
            about = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dictionary
        sums = {
            name: (str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest())
            for name, value in tensors.items()
        }
        return {"metadata": timeless(about), "tensors": sums}
    if path.suffix == ".toml":
        return tomllib.loads(path.read_text())
    if path.name == "manifest.json":  # its form may change: resumed runs show that it serves
        entries = json.loads(path.read_text())["entries"]
        form = ("info", "clients", "table", "files")
        return [timeless({name: value for name, value in entry.items() if name not in form}) for entry in entries]
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_text(errors="replace").splitlines()


def without_folder(value: Any, folder: str) -> Any:
    """Return a JSON value whose texts name no checkout."""
    if isinstance(value, dict):
        return {name: without_folder(entry, folder) for name, entry in value.items()}
    if isinstance(value, list):
        return [without_folder(entry, folder) for entry in value]
    return value.replace(folder, "CHECKOUT") if isinstance(value, str) else value


def timeless(value: Any) -> Any:
    """Return a JSON value without the entries that differ between any two runs."""
    if isinstance(value, dict):
        return {name: timeless(member) for name, member in value.items() if name not in VOLATILE | SUMS}
    if isinstance(value, list):
        return [timeless(item) for item in value]
    return value


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Yield the places where two JSON values differ, one line for each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}, key=str):
            if name not in old or name not in new:
                if name in old or name not in ADDED or where not in ("/config.toml", "/config.toml/options"):
                    yield f"{where}/{name} is only in {'OLD' if name in old else 'NEW'}"
            else:
                yield from differences(old[name], new[name], f"{where}/{name}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{where}/{index}")
    elif old != new:
        yield f"{where}: {str(old)[:200]} in OLD, {str(new)[:200]} in NEW"


def help_seconds(checkout: Checkout) -> float:
    """Return the processor seconds of ``--help``."""
    before = os.times()
    checkout.python("-m", "fedkern.run", "--help")
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", default="", help='runs ("METHOD, TASK, MODE") and commands that hold these words')
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--keep", type=Path, help="a new folder for the runs, which are deleted otherwise")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch) / "runs"
        sides = [Checkout(given.old, folder / "old"), Checkout(given.new, folder / "new")]
        write_labels(folder / "labels.csv")
        before, after = (side.list_served() for side in sides)
        different, refused, peaks = 0, 0, []
        begin = time.monotonic()
        for method, task in sorted(before ^ after):
            if given.only in f"{method}, {task}":
                lost = (method, task) in before
                different += lost
                print(f"{method}, {task}: {'differs' if lost else 'gained'}, only {'OLD' if lost else 'NEW'} serves it")
        served_runs = [*sorted(before & after), *((method, name) for method in ("fedavg", "moon") for name in NETWORKS)]
        served_runs += [(method, name) for method in ("fedavg", "scaffold", "ditto") for name in DATASETS]
        cases = [(*served, mode) for served in served_runs for mode in MODES[:-1] if mode in given.modes]
        cases = [case for case in cases if case[1] not in DATASETS or case[2] not in ("two ranks", "flower")]
        for case in cases:
            if given.only in ", ".join(case):
                with ThreadPoolExecutor() as pool:
                    (old, memory), (new, new_memory) = pool.map(lambda side, case=case: side.run(*case), sides)
                peaks.append(new_memory / memory)
                lines = list(differences(old, new))
                error = "" if lines else new["error"]
                if error and "UserError" not in error:
                    lines = [f"both end in {error}"]
                different += bool(lines)
                refused += bool(error and not lines)
                said = "differs" if lines else f"same: {error}" if error else "same"
                print(f"{', '.join(case)}: {said}", flush=True)
                print(*(f"    {line}" for line in lines[:10]), sep="\n", end="\n" if lines else "", flush=True)
        for wrong in WRONG if "commands" in given.modes else ():
            if given.only in wrong:
                old, new = (side.python("-m", "fedkern.run", *wrong.split())[:2] for side in sides)
                equal = old == new and old[0] == 2
                different += not equal
                print(f"{wrong}: {'same' if equal else f'differs: {old} in OLD, {new} in NEW'}", flush=True)
        if peaks:
            print(f"peak memory: {statistics.median(peaks):.3f} of OLD's (median), {max(peaks):.3f} at most")
        if "commands" in given.modes:
            seconds = [[help_seconds(side) for side in sides] for _ in range(5)]
            print(f"--help: {statistics.median(new / old for old, new in seconds):.2f} of OLD's processor time")
        print(f"{different} differ, {refused} runs end in the same error, in {time.monotonic() - begin:.0f} s")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
