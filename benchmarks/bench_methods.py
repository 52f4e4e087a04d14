"""Whole runs of fedkern beside an earlier fedkern and beside the methods in plain PyTorch.

    python -m benchmarks.bench_methods --before DIR --data-root FOLDER     # measures, writes results/methods_<cpu>.*
    python -m benchmarks.bench_methods --device cuda                       # the same on a GPU, methods_<gpu>.*

Variants, every one a command of its own, so that imports and start-up count:

* ``plain``: benchmarks/plain, the method as it is usually written;
* ``before``: another checkout of fedkern with its compiled core, for example the commit that a change began at;
* ``fedkern``: its present defaults;
* ``bf16``: the same with ``--precision bf16``;
* ``reference``: the same without kernels (``FEDKERN_BACKEND=reference``), which shows the gain by kernels;
* ``plain one core`` and ``fedkern one core``: both with one thread, in one process, which shows the gain by processes.

All of a case have the same data, partition, network, settings, number of optimiser steps and rounds of evaluation.
They take turns; repeat number i has seed i for all, so a speed-up is the median over the repeats of the ratios of one
seed, and the main figure has a mean and a spread over the seeds.
"""

import argparse
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean, mean, median, stdev
from typing import Any

import torch

from benchmarks import comparisons, gpu_use, machines, processes
from fedkern.settings.config import RunConfig

ROOT = Path(__file__).parent.parent
RESULTS = comparisons.RESULTS
PLAIN, OURS = "plain", "fedkern"
ONE_CORE = {PLAIN: "plain one core", OURS: "fedkern one core"}
VARIANTS = (PLAIN, "before", OURS, "bf16", "reference", *ONE_CORE.values())
METHODS = ("fedgid", "fedlpfm", "fusefl", "fediod", "feddra", "fedavg", "fedprox", "scaffold")
PATHS = ("teacher_cache", "boxes")  # settings that name a file of the variant's own
MAIN = ("accuracy", "ood_accuracy", "i2t_r1")
"""The main figure of a run is the first of these that it has."""
ENVIRONMENT = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS", "PYTHONPATH", "FEDKERN_BACKEND",
    "PYTHONDONTWRITEBYTECODE",  # every command would compile the sources anew
)  # fmt: skip
"""What a variant does not inherit: every one has its own defaults."""

COMMON: Mapping[str, Any] = {"grad_cam": 0}  # a figure for fedkern's report that no other program draws
IMAGES = {"data": "cifar10", "train_samples": 5000, "clients": 10, "partition": "iid", "model": "resnet8"}
LARGE_STEPS = {**IMAGES, "local_epochs": 1}


@dataclass(frozen=True)
class Case:
    """Case that all variants run.

    Attributes:
        setting: "default", a default run that is shorter, or "large".
        settings, options: of the run, over the method's defaults.
        boxes: whether a file of boxes names the images' objects, the central half of every image.
    """

    method: str
    setting: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    boxes: bool = False

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting}"

    @property
    def needs_files(self) -> bool:
        return self.settings.get("data") == IMAGES["data"]


CASES = (
    Case("fedgid", "default", {"rounds": 4}),
    Case("fedlpfm", "default", {"rounds": 12}),
    Case("fusefl", "default", {"local_epochs": 10}),
    Case("fediod", "default", {"rounds": 4, "local_epochs": 10}),
    Case("feddra", "default", {"rounds": 3}),
    Case("fedavg", "default", {"rounds": 8}),
    Case("fedprox", "default", {"rounds": 8}),
    Case("scaffold", "default", {"rounds": 8}),
    Case("fedgid", "large", {**LARGE_STEPS, "rounds": 1}, boxes=True),
    Case("fedlpfm", "large", {**LARGE_STEPS, "rounds": 1, "public_samples": 500}, {"pretrain_epochs": 2}),
    Case("fusefl", "large", {**IMAGES, "local_epochs": 4}, {"virtual_features": 1000}),
    Case("fediod", "large", {**LARGE_STEPS, "rounds": 2, "width": 8, "eval_every": 2}, {"iterations": 10}),
    Case("feddra", "large", {"train_samples": 5000, "clients": 10, "batch_size": 64, "rounds": 2, "local_steps": 10},
         {"alignment_steps": 5}),
    Case("fedavg", "large", {**LARGE_STEPS, "rounds": 2, "eval_every": 2}),
    Case("fedprox", "large", {**LARGE_STEPS, "rounds": 2, "eval_every": 2}),
    Case("scaffold", "large", {**LARGE_STEPS, "rounds": 2, "eval_every": 2}),
)  # fmt: skip

PLAIN_SETTINGS = (
    "data", "data_root", "clients", "partition", "correlation", "train_samples", "public_samples", "augment", "model",
    "width", "rounds", "local_epochs", "local_steps", "batch_size", "optimizer", "lr", "lr_end", "momentum",
    "weight_decay", "eval_every", "device",
)  # fmt: skip
"""Settings that the plain methods have flags for."""
PLAIN_ASSUMES = {
    "sample_fraction": 1.0, "lr_decay": 1.0, "clip_norm": 0.0, "client_test": 0.0,
    "image_encoder": "conv", "text_encoder": "words", "max_update_norm": 0.0, "clip_update_norm": 0.0, "on_nan": "stop",
}  # fmt: skip
PLAIN_LACKS = ("lr_steps", "held_out_client", "freeze_bn_after", "teachers", "patient_images")


# -- commands ----------------------------------------------------------------------------------------------------------


def config(case: Case, folder: Path, data_root: str | None, device: str = "cpu") -> RunConfig:
    """Return every effective setting of the case."""
    return RunConfig.make(
        case.method,
        **_settings(case, data_root, device),
        options=_options(case, folder),
        data_options=_data_options(case, folder),
    )


def _settings(case: Case, data_root: str | None, device: str) -> dict[str, Any]:
    root = {"data_root": data_root} if case.needs_files else {}
    return {**COMMON, **case.settings, **root, "device": device}


def _options(case: Case, folder: Path) -> dict[str, Any]:
    cold = {"teacher_cache": str(folder / "teachers")} if case.method == "fedlpfm" else {}  # everybody trains it anew
    return {**case.options, **cold}


def _data_options(case: Case, folder: Path) -> dict[str, Any]:
    return {"boxes": str(folder / "boxes.json")} if case.boxes else {}


def write_boxes(path: Path, count: int = 50_000) -> None:
    """Name the central half, side by side, of every training image of CIFAR-10 as its object."""
    boxes = {f"train/{row}": [[0.25, 0.25, 0.75, 0.75]] for row in range(count)}
    path.write_text(json.dumps({"units": "fraction", "boxes": boxes}))


def run_words(
    case: Case, folder: Path, data_root: str | None, seed: int, threads: int, device: str = "cpu"
) -> list[str]:
    """Return the words behind ``python -m fedkern.run``."""
    settings = {**_settings(case, data_root, device), "seed": seed, "out": folder / "run"}
    if threads:
        settings["threads"] = threads
    options = [f"{name}={value}" for name, value in _data_options(case, folder).items()]
    if options:
        settings["data_option"] = tuple(options)
    words = [case.method]
    for name, value in settings.items():
        for item in value if isinstance(value, tuple) else (value,):
            words += [f"--{name.replace('_', '-')}", str(item)]
    for name, value in _options(case, folder).items():
        words += ["--method-option", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return words


def plain_words(effective: RunConfig, folder: Path, seed: int, threads: int) -> list[str]:
    """Return the words behind ``python -m benchmarks.plain.METHOD`` of a run with these settings.

    Raises:
        ValueError: the plain method computes something else than the settings ask for.
    """
    module = importlib.import_module(f"benchmarks.plain.{effective.method}")
    values = effective.to_dict()
    assumed = {**PLAIN_ASSUMES, "buffers": "pool" if effective.method == "feddra" else "average"}
    for name, value in assumed.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name}: expected {value}, which the plain {effective.method} has, given {values[name]}")
    for name in PLAIN_LACKS:
        if name in values:
            raise ValueError(f"{name}: expected none, which the plain {effective.method} lacks, given {values[name]}")
    words: list[str] = []
    for name in PLAIN_SETTINGS:
        if values.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(values[name])]
    for name, value in values["options"].items():
        if name in module.FLAGS:
            words += [f"--{name.replace('_', '-')}", str(value)]
        elif name in module.ASSUMES:
            if value != module.ASSUMES[name]:
                raise ValueError(
                    f"{name}: expected {module.ASSUMES[name]}, which the plain {effective.method} has, given {value}"
                )
        elif name not in getattr(module, "IGNORES", ()):
            raise ValueError(f"{name}: the plain {effective.method} knows no such method option")
    for name, value in effective.data_options.items():
        words += ["--data-option", f"{name}={value}"]
    return [*words, "--seed", str(seed), "--threads", str(threads), "--out", str(folder / "records.json")]


def missing(variant: str, before: Path | None, device: str = "cpu") -> str:
    """Return the reason why a variant cannot run, or ""."""
    if variant in ONE_CORE.values() and device != "cpu":
        return "cores are the CPU's"
    if variant == "before" and before is None:
        return "no --before was given"
    return ""


def check_checkout(before: Path) -> Path:
    """Return the folder of another checkout whose ``import fedkern`` finds its own package and core.

    Raises:
        SystemExit: the import finds another package, or no core.
    """
    before = before.resolve()
    asked = "import torch, fedkern._cpu; print(fedkern.__file__)"  # its own path: before moves, modules had other names
    with tempfile.TemporaryDirectory() as folder:
        answer = subprocess.run(
            [sys.executable, "-c", asked], cwd=folder, env=environment("before", before), check=False,
            capture_output=True, text=True,
        )  # fmt: skip
    if answer.returncode or not Path(answer.stdout.strip()).is_relative_to(before):
        last = (answer.stderr.strip().splitlines() or [answer.stdout.strip()])[-1]
        sys.exit(f"--before {before} holds no fedkern with a compiled core: {last}")
    return before


def environment(variant: str, before: Path | None) -> dict[str, str]:
    """Return the environment of a variant's commands."""
    variables = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    variables["PYTHONPATH"] = str(before if variant == "before" else ROOT)
    if variant == "reference" or variant.startswith(PLAIN):  # whose networks are fedkern's, with its operators
        variables["FEDKERN_BACKEND"] = "reference"
    return variables


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Runs of a case: lists by variant, an entry per repeat.

    Attributes:
        seconds, cpu_seconds, peak_bytes: of the whole command.
        round_seconds: mean over the run's recorded rounds.
        first_seconds, later_seconds: the first round, in which libraries start and memory is made, and the median of
            the later ones; none of runs of one round.
        gpu_utilisation, gpu_bytes: of runs on a GPU, the mean in per cent, and the most memory beyond that before.
        figure: the run's main figure, named ``main``.
        rounds: how many rounds every run had; 0: not known.
        missing: variants that did not run, and why.
        differs: settings of ``before``'s run that are not ours, as "name: theirs, ours".
    """

    method: str
    setting: str
    main: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, list[int]] = field(default_factory=dict)
    round_seconds: dict[str, list[float]] = field(default_factory=dict)
    first_seconds: dict[str, list[float]] = field(default_factory=dict)
    later_seconds: dict[str, list[float]] = field(default_factory=dict)
    figure: dict[str, list[float]] = field(default_factory=dict)
    gpu_utilisation: dict[str, list[float]] = field(default_factory=dict)
    gpu_bytes: dict[str, list[int]] = field(default_factory=dict)
    rounds: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting}"

    def ratios(self, slower: str, faster: str, of: str = "seconds") -> list[float]:
        """Return ``slower``'s figures over ``faster``'s, repeat by repeat.

        Empty where one of them did not run.
        """
        times: dict[str, list[float]] = getattr(self, of)
        return [a / b for a, b in zip(times.get(slower, []), times.get(faster, []), strict=False)]

    def speedup(self, slower: str, faster: str = OURS, of: str = "seconds") -> float | None:
        """Return the median of :meth:`ratios`."""
        ratios = self.ratios(slower, faster, of)
        return median(ratios) if ratios else None

    def outside_seconds(self, variant: str) -> float | None:
        """Return a command's seconds without its rounds: start-up, data, work before the first round, pictures."""
        if variant not in self.seconds or not self.rounds:
            return None
        times = zip(self.seconds[variant], self.round_seconds[variant], strict=True)
        return median(total - self.rounds * of_rounds for total, of_rounds in times)

    def apart(self, variant: str) -> bool | None:
        """Return whether the main figure differs from ours by more than twice the spread over the seeds.

        None: not known.
        """
        ours, theirs = self.figure.get(OURS, []), self.figure.get(variant, [])
        if min(len(ours), len(theirs)) < 2:
            return None
        spread = math.sqrt((stdev(ours) ** 2 + stdev(theirs) ** 2) / 2)
        return abs(mean(ours) - mean(theirs)) > 2 * max(spread, 1e-3)


def read_rounds(variant: str, folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's rounds."""
    if variant.startswith(PLAIN):
        return json.loads((folder / "records.json").read_text())["rounds"]
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def other_settings(before: Path, ours: Path) -> list[str]:
    """Return differences between the config.toml of two run folders, of the settings that both have."""
    old, new = (tomllib.loads((folder / "run" / "config.toml").read_text()) for folder in (before, ours))
    differences = []
    for table in ("", "options", "data_options"):
        a, b = (config.get(table, {}) if table else config for config in (old, new))
        names = [name for name in a if name in b and not isinstance(a[name], dict)]
        differences += [f"{name}: {a[name]}, {b[name]}" for name in names if a[name] != b[name] and name not in PATHS]
    return differences


def measure(
    case: Case,
    variants: Sequence[str],
    repeats: int,
    *,
    before: Path | None,
    data_root: str | None,
    device: str = "cpu",
) -> Row:
    """Run a case's variants in turn, starting with another one in every repeat."""
    row = Row(case.method, case.setting, settings={**case.settings, **case.options})
    row.missing = {name: why for name in variants if (why := missing(name, before, device))}
    names = [name for name in variants if name not in row.missing]
    for repeat in range(repeats):
        turn = repeat % len(names)
        with tempfile.TemporaryDirectory(prefix="methods-") as made:
            folders = {name: Path(made) / name for name in names}
            for name in names[turn:] + names[:turn]:
                folders[name].mkdir()
                _measure(row, case, name, folders[name], repeat, before, data_root, device)
            if {"before", OURS} <= folders.keys():
                row.differs = other_settings(folders["before"], folders[OURS])
    return row


def _measure(
    row: Row, case: Case, name: str, folder: Path, seed: int, before: Path | None, data_root: str | None, device: str
) -> None:
    if case.boxes:
        write_boxes(folder / "boxes.json")
    one_core = name in ONE_CORE.values()
    threads = 1 if one_core else 0  # 0: each its own default
    if name.startswith(PLAIN):
        words = [f"benchmarks.plain.{case.method}"]
        words += plain_words(config(case, folder, data_root, device), folder, seed, threads)
    else:
        words = ["fedkern.run", *run_words(case, folder, data_root, seed, threads, device)]
        words += ["--precision", "bf16"] if name == "bf16" else []
        words += ["--workers", "1"] if one_core else []
    working = folder / "empty"  # python -m looks for modules in the working folder first
    working.mkdir()
    with gpu_use.watch() if device == "cuda" else nullcontext() as use:
        cost = processes.run([sys.executable, "-m", *words], environment(name, before), working)
    rounds = read_rounds(name, folder)
    row.main, figure = next((name, float(rounds[-1][name])) for name in MAIN if name in rounds[-1])
    row.rounds = len(rounds)
    first_round, *later = (record["round_seconds"] for record in rounds)
    tables = [
        (row.seconds, cost.seconds), (row.cpu_seconds, cost.cpu_seconds), (row.peak_bytes, cost.peak_bytes),
        (row.round_seconds, mean([first_round, *later])), (row.figure, figure),
    ]  # fmt: skip
    if later:
        tables += [(row.first_seconds, first_round), (row.later_seconds, median(later))]
    for table, value in tables:
        table.setdefault(name, []).append(value)
    if use is not None:
        row.gpu_utilisation.setdefault(name, []).append(use.mean)
        row.gpu_bytes.setdefault(name, []).append(use.taken)
    print(
        f"{case.name}, {name}, seed {seed}: {cost.seconds:.2f} s, {row.round_seconds[name][-1]:.2f} s a round, "
        f"{cost.cpu_seconds:.2f} s of processor, {cost.peak_bytes / 1e6:.0f} MB, {row.main} {figure:.3f}",
        flush=True,
    )


def speedups(rows: Iterable[Row], slower: str, faster: str, of: str = "seconds") -> list[float]:
    """Return the speed-ups of those rows that have one, with the same settings."""
    alike = (row for row in rows if slower != "before" or not row.differs)
    return [gain for row in alike if (gain := row.speedup(slower, faster, of)) is not None]


# -- results -----------------------------------------------------------------------------------------------------------


def results_path(machine: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    return folder / f"methods_{comparisons.slug(machine)}.json"


def read(path: Path, machine: Mapping[str, Any]) -> list[Row]:
    """Return the recorded rows of this machine, none without a file."""
    content = json.loads(path.read_text()) if path.exists() else {}
    if not content or comparisons.machine_difference(content["machine"], dict(machine)):
        return []
    return [Row(**row) for row in content["cases"]]


def write(rows: Sequence[Row], machine: Mapping[str, Any], *, before: str, folder: Path = RESULTS) -> Path:
    """Write ``methods_<cpu>.json`` and its page, and keep the file's rows of other cases."""
    path = results_path(machine, folder)
    names = {row.name for row in rows}
    order = {case.name: i for i, case in enumerate(CASES)}
    kept = [row for row in read(path, machine) if row.name not in names]
    rows = sorted([*kept, *rows], key=lambda row: order.get(row.name, len(order)))
    content = {"machine": dict(machine), "before": before, "cases": [asdict(row) for row in rows]}
    folder.mkdir(parents=True, exist_ok=True)
    for target, text in ((path, json.dumps(content, indent=1) + "\n"), (path.with_suffix(".md"), page(rows, content))):
        partial = target.with_name(target.name + ".partial")
        partial.write_text(text)
        partial.replace(target)
    return path


def page(rows: Sequence[Row], content: Mapping[str, Any]) -> str:
    """Return the page of a results file."""
    machine = content["machine"]
    lines = [
        f"# Whole runs on {comparisons.processor(machine)}",
        "",
        "Made by `python -m benchmarks.bench_methods`, which says what the variants are. "
        f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('isa')}; torch {machine.get('torch')}; "
        f'{machine.get("time")}. "before" is fedkern at {content["before"] or "no commit"}. Every variant had '
        "its own default of threads, but for those on one core; fedkern's command makes OpenMP's threads sleep early "
        "while they wait, the plain scripts leave OpenMP as it is. Seconds are medians over the repeats, a speed-up is "
        "the median of the ratios of one repeat; below 1 it is bold. A run whose settings were others before counts in "
        "no mean over it.",
    ]
    for setting, title in (("default", "Default runs, shortened"), ("large", "The larger setting")):
        mine = [row for row in rows if row.setting == setting]
        if mine:
            lines += ["", f"## {title}", "", *_speed_table(mine), "", *_rounds_table(mine), *_cost_table(mine)]
            lines += ["", *_figure_table(mine)]
            if any(row.gpu_utilisation for row in mine):
                lines += ["", *_gpu_table(mine)]
    notes = [f"* {row.name}: {name} is missing: {why}" for row in rows for name, why in row.missing.items()]
    notes += [f"* {row.name}: before's settings differ ({'; '.join(row.differs)})" for row in rows if row.differs]
    return "\n".join([*lines, *([""] if notes else []), *notes, ""])


def _names(rows: Sequence[Row]) -> list[str]:
    return [name for name in VARIANTS if any(name in row.seconds for row in rows)]


def _speed_table(rows: Sequence[Row]) -> list[str]:
    names = _names(rows)
    pairs = [(slower, OURS) for slower in ("plain", "before", "reference") if slower in names]
    pairs += [(OURS, "bf16")] if "bf16" in names else []
    heads = [f"{name}, s" for name in names] + [f"{faster} over {slower}" for slower, faster in pairs]
    lines = ["Whole commands, and in brackets the mean of all rounds, the first one included:", ""]
    lines += [f"| run | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row in rows:
        times = [(row.seconds.get(name), row.round_seconds.get(name)) for name in names]
        cells = [f"{median(run):.2f} ({median(rounds):.2f})" if run and rounds else "–" for run, rounds in times]
        cells += [f"{_ratio(row.speedup(*pair))} ({_ratio(row.speedup(*pair, of='round_seconds'))})" for pair in pairs]
        lines.append(f"| {row.method} | {' | '.join(cells)} |")
    means = []
    for pair in pairs:
        commands, rounds = speedups(rows, *pair), speedups(rows, *pair, of="round_seconds")
        means.append(f"{_ratio(geometric_mean(commands))} ({_ratio(geometric_mean(rounds))})" if commands else "–")
    return [*lines, f"| geometric mean |{' |' * len(names)} {' | '.join(means)} |"]


def _rounds_table(rows: Sequence[Row]) -> list[str]:
    """Return the first round and later ones, of runs that record both."""
    rows, names = [row for row in rows if row.later_seconds], _names(rows)
    lines = ["Seconds of the first round, and of the median later one:", "", f"| run | {' | '.join(names)} |"]
    lines.append("|---|" + "---:|" * len(names))
    for row in rows:
        pairs = ((row.first_seconds.get(name), row.later_seconds.get(name)) for name in names)
        cells = (f"{median(start):.2f}, {median(later):.2f}" if start and later else "–" for start, later in pairs)
        lines.append(f"| {row.method} | {' | '.join(cells)} |")
    return [*lines, ""] if rows else []


def _cost_table(rows: Sequence[Row]) -> list[str]:
    about = "Processor seconds and peak memory of all processes of a command:"
    return _pairs_table(rows, about, "s, MB", ".1f", "cpu_seconds", "peak_bytes")


def _gpu_table(rows: Sequence[Row]) -> list[str]:
    about = "Utilisation of the GPU over a whole command, as the driver says, and the most memory taken:"
    return _pairs_table(rows, about, "%, MB", ".0f", "gpu_utilisation", "gpu_bytes")


def _pairs_table(rows: Sequence[Row], about: str, units: str, digits: str, figure: str, size: str) -> list[str]:
    """Return the medians of two attributes of the rows in a cell, the second in bytes."""
    names = _names(rows)
    lines = [about, "", f"| run | {' | '.join(f'{name}, {units}' for name in names)} |", "|---|" + "---:|" * len(names)]
    for row in rows:
        left, taken = getattr(row, figure), getattr(row, size)
        cells = [
            f"{median(left[name]):{digits}}, {median(taken[name]) / 1e6:.0f}" if name in left else "–" for name in names
        ]
        lines.append(f"| {row.method} | {' | '.join(cells)} |")
    return lines


def _figure_table(rows: Sequence[Row]) -> list[str]:
    names = _names(rows)
    lines = [
        "The main figure, mean ± standard deviation over the seeds; bold where it lies more than twice that from "
        "fedkern's:", "",
        f"| run | figure | {' | '.join(names)} |", "|---|---|" + "---:|" * len(names),
    ]  # fmt: skip
    for row in rows:
        cells = []
        for name in names:
            values = row.figure.get(name, [])
            spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
            text = f"{100 * mean(values):.1f}{spread}" if values else "–"
            cells.append(f"**{text}**" if row.apart(name) else text)
        lines.append(f"| {row.method} | {row.main} | {' | '.join(cells)} |")
    return lines


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×" if value >= 1 else f"**{value:.2f}×**"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_methods", description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="another checkout of fedkern, its core compiled")
    parser.add_argument("--data-root", help="folder of CIFAR-10's binary files, for the larger setting")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--settings", nargs="+", choices=("default", "large"), default=("default", "large"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, every one with a seed of its own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all variants compute")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--dry", action="store_true", help="print the page and write nothing")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: leave --device out")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the command that is measured ends too
    cases = [case for case in CASES if case.method in args.methods and case.setting in args.settings]
    left_out = [case.name for case in cases if case.needs_files and not args.data_root]
    cases = [case for case in cases if case.name not in left_out]
    if left_out:
        print(f"left out without --data-root: {', '.join(left_out)}")
    data_root = str(Path(args.data_root).resolve()) if args.data_root else None
    machine = machines.machine(args.device)
    before = check_checkout(args.before) if args.before else None
    rows = []
    for case in cases:
        rows.append(measure(case, args.variants, args.repeats, before=before, data_root=data_root, device=args.device))
        if not args.dry:  # a session that is killed loses the case that it was at
            write(rows, machine, before=_revision(before), folder=args.results)
    content = {"machine": machine, "before": _revision(before)}
    print(page(rows, content))
    return 0


def _revision(checkout: Path | None) -> str:
    """Return the commit of another checkout, or its path's last part without a repository."""
    if checkout is None:
        return ""
    asked = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or checkout.name


if __name__ == "__main__":
    sys.exit(main())
