"""What the studies share: many configurations run a few at a time, learning rates chosen by one rule, tables.

Every case has its own run folder, and what is finished is kept.

A study's table is only as good as its bookkeeping: every figure comes from a run folder with its ``config.toml``, an
interrupted study goes on where it stopped, and a folder made with other settings is refused, not silently reused.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.recorded import UNRECORDED
from fedkern.cli.flags import parse
from fedkern.cli.request import effective
from fedkern.engine.store.records import read_metrics, read_summary
from fedkern.process.versions import versions
from fedkern.settings.stored import load_settings

RESULTS = Path(__file__).parent / "results"
JPEG = "The images went through JPEG once: compare within a table, not with published figures"
"""What pages on the CIFAR-10 at hand say."""
FILES = {
    "mnist": "the four IDX files",
    "cifar10": "CIFAR-10's official binary files",
    "membrane": "the folders image and label with 30 PNG files each",
}
"""What ``--data-root`` must hold, for the studies that need it."""


@dataclass(frozen=True)
class Case:
    """One run: the folder's name, and the arguments of ``python -m fedkern.run`` behind ``--out``.

    ``program`` is what stands in its place: a module that takes the same arguments, and its own before them.
    """

    name: str
    arguments: tuple[str, ...]
    program: tuple[str, ...] = ("fedkern.run",)


def folder_name(words: Iterable[str]) -> str:
    """The words joined into the name of a folder."""
    name = "_".join(words)
    return "".join(letter if letter.isalnum() or letter in "._-=" else "-" for letter in name)


def arguments(method: str, settings: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The command line of a run from settings (``local_epochs=2`` -> ``--local-epochs 2``) and method options.

    A setting with a tuple of values is a flag that is given so many times.
    """
    words = [method]
    for name, value in settings.items():
        for one in value if isinstance(value, tuple) else (value,):
            words += [f"--{name.replace('_', '-')}", str(one)]
    for name, value in (options or {}).items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words += ["--method-option", f"{name}={text}"]
    return tuple(words)


def run(cases: Iterable[Case], folder: Path, *, workers: int = 2) -> dict[str, dict[str, Any]]:
    """Runs every case that has no summary yet; returns all summaries by name.

    Args:
        cases: the runs; one named twice must be the same both times.
        folder: holds a run folder per case.
        workers: how many run at once, each on one thread.

    Raises:
        SystemExit: a run failed; its last line is repeated.
    """
    wanted: dict[str, Case] = {}
    for case in cases:
        if wanted.setdefault(case.name, case) != case:
            sys.exit(f'the case "{case.name}" is defined twice, differently')
    folder.mkdir(parents=True, exist_ok=True)
    for case in wanted.values():
        _refuse_other_settings(folder / case.name, case)
    waiting = [case for case in wanted.values() if not (folder / case.name / "summary.json").exists()]
    done, total, start = 0, len(waiting), time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated; the same command goes on from here"))
    words = tempfile.TemporaryDirectory(prefix="study-")
    said = Path(words.name)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                case = waiting.pop(0)
                running[case.name] = _launch(folder / case.name, case, said)
            time.sleep(0.2)
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    message = said.joinpath(name).read_text(errors="replace").strip().splitlines()
                    sys.exit(f"{name} failed with exit code {process.returncode}: {message[-1] if message else ''}")
                done += 1
                left = (time.monotonic() - start) / done * (total - done)
                print(f"{done}/{total} {name}, about {left / 60:.0f} min left", flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        words.cleanup()
    return {name: _summary(folder / name) for name in wanted}


def _summary(folder: Path) -> dict[str, Any]:
    summary = read_summary(folder)
    return sys.exit(f"{folder / 'summary.json'} is damaged: delete the folder") if summary is None else summary


class Runs:
    """The finished runs of a study.

    Args:
        folder: holds a run folder per case.
        workers: how many run at once.
        settings: given to every run beside the case's own, for example ``data_root``; not part of the folder's name.
    """

    def __init__(self, folder: Path, workers: int, settings: Mapping[str, Any] | None = None) -> None:
        self.folder, self.workers, self.settings = folder, workers, dict(settings or {})
        self.summaries: dict[str, dict[str, Any]] = {}

    def case(
        self, method: str, settings: Mapping[str, Any], options: Mapping[str, Any] | None = None, *words: str
    ) -> Case:
        """A run of ``method``; ``words`` name what tells it apart from the study's other ones."""
        return Case(folder_name([method, *words]), arguments(method, {**settings, **self.settings}, options))

    def run(self, cases: Iterable[Case]) -> None:
        """Runs those that are not finished."""
        self.summaries.update(run(cases, self.folder, workers=self.workers))

    def metrics(self, case: Case) -> dict[str, float]:
        """The figures of a finished run's last model."""
        metrics: dict[str, float] = self.summaries[case.name]["metrics"]
        return metrics

    def rounds(self, case: Case) -> list[dict[str, Any]]:
        """The records of its rounds, with figures where they were evaluated."""
        return read_metrics(self.folder / case.name)

    def versions(self) -> dict[str, str]:
        """Of fedkern and torch, from any of the runs; this process's where nothing was run."""
        recorded: dict[str, str] = next(iter(self.summaries.values()), {}).get("versions") or versions()
        return recorded


def best_rate(scores: Mapping[float, Sequence[float]]) -> float:
    """The learning rate with the highest mean validation accuracy (the lower one on a tie)."""
    return max(sorted(scores), key=lambda rate: mean(scores[rate]))


def beyond(rate: float, grid: Sequence[float]) -> list[float]:
    """The next learning rate outwards where ``rate`` is an edge of the grid: a third, or three times as large."""
    return [round(rate * factor, 6) for edge, factor in ((min(grid), 1 / 3), (max(grid), 3)) if rate == edge]


RATES_HEADER = ("", "learning rate: validation, test accuracy in %", "best by validation")


def tried_rates(name: str, by_rate: Mapping[float, Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """A line under :data:`RATES_HEADER`, and its numbers, of figures by learning rate."""
    best = best_rate({lr: [figures["validation_accuracy"]] for lr, figures in by_rate.items()})
    shown = (f"{lr:g}: {100 * m['validation_accuracy']:.1f}, {100 * m['accuracy']:.1f}" for lr, m in by_rate.items())
    return [name, "; ".join(shown), f"{best:g}"], {"best": best, **{str(lr): m for lr, m in by_rate.items()}}


def stored_rates(results: str, settings: Mapping[str, Any], rates: Sequence[float]) -> dict[str, float]:
    """The learning rates by row of a finished section, ``results/<results>.json``.

    Empty where settings differ, or the grid that they were chosen from (which earlier pages do not name).
    """
    path = RESULTS / f"{results}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    if content.get("settings") != json.loads(json.dumps(dict(settings))):
        return {}
    if content.get("rates", list(rates)) != list(rates):
        return {}
    return {name: row["lr"] for name, row in content.items() if isinstance(row, dict) and "lr" in row}


def transfer_seconds(size: float, megabits: float) -> float:
    """Seconds that ``size`` bytes need at so many Mbit/s."""
    return size * 8 / (megabits * 1e6)


def publish(
    name: str, title: str, about: str, page: str, numbers: Mapping[str, Any], versions: Mapping[str, str]
) -> None:
    """Writes ``results/<name>.md`` and ``.json``, and prints the page."""
    versions = {"commit": UNRECORDED, **versions}
    software = f"fedkern {versions['fedkern']} at commit {versions['commit']}, torch {versions['torch']}"
    made = f"{software}, {platform.machine()}, one thread per run."
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(f"# {title}\n\n{about}  {made}\n\n{page}")
    (RESULTS / f"{name}.json").write_text(json.dumps({**numbers, "versions": versions}, indent=1) + "\n")
    print(page)


def command_line(
    module: str, description: str, studies: Mapping[str, Any], files: Mapping[str, str], sections: Iterable[str] = ()
) -> argparse.Namespace:
    """What the user asked for: ``study``, ``only`` (sections), ``data_root`` (absolute or None), ``out``, ``workers``.

    Args:
        module: the study's module, for example ``"study_fusefl"``.
        description: one line.
        studies: the studies by name.
        files: what ``--data-root`` must hold, for the studies that need it.
        sections: parts of a study that can be run alone.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.studies.{module}", description=description)
    parser.add_argument("study", choices=studies, help="which data")
    needs = "; ".join(f"{name}: {what}" for name, what in files.items())
    parser.add_argument("--data-root", help=f"folder of the data files ({needs})")
    parser.add_argument("--out", type=Path, help=f"folder of the runs (default: runs/{module.replace('_', '-')}-STUDY)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    if sections := tuple(sections):
        parser.add_argument("--only", nargs="+", choices=sections, default=sections, help="sections (default: all)")
    args = parser.parse_args()
    if args.study in files and not args.data_root:
        parser.error(f"{args.study} needs --data-root, the folder of {files[args.study]}")
    args.data_root = str(Path(args.data_root).resolve()) if args.data_root else None
    args.out = args.out or Path("runs") / f"{module.replace('_', '-')}-{args.study}"
    return args


def run_sections(
    name: str,
    title: str,
    description: str,
    studies: Mapping[str, Any],
    sections: Mapping[str, Callable[[Any], tuple[str, dict[str, Any]]]],
    make: Callable[[Any, Path, int, Mapping[str, Any]], Runs],
    about: Callable[[Any], str],
) -> None:
    """The command of a study in sections: runs those that were asked for and publishes each on a page of its own.

    Args:
        name: the study's module is ``study_<name>`` and its results are ``<name>_<study>_<section>``.
        title: the method, as pages name it.
        description: the module's docstring.
        studies: the studies by name, each with ``settings``.
        sections: what makes a page and its numbers from the finished runs, by name.
        make: makes the runs from the study, folder, workers and settings.
        about: what follows the settings on a page, its punctuation included.
    """
    module = f"study_{name}"
    files = {study: what for study, what in FILES.items() if study in studies}
    args = command_line(module, description.split("\n")[0], studies, files, sections)
    study = studies[args.study]
    runs = make(study, args.out, args.workers, {"data_root": args.data_root} if args.data_root else {})
    settings = ", ".join(f"{knob.replace('_', ' ')} {value}" for knob, value in study.settings.items())
    for section in args.only:
        page, numbers = sections[section](runs)
        numbers = {**numbers, "settings": dict(study.settings)}
        if rates := getattr(study, "rates", None):
            numbers["rates"] = list(rates)
        made = (
            f"Made by `python -m benchmarks.studies.{module} {args.study} --only {section}`: {settings}{about(study)}"
        )
        heading = f"{title} on {args.study}: {section}"
        publish(f"{name}_{args.study}_{section}", heading, made, page, numbers, runs.versions())


def _launch(run_folder: Path, case: Case, said: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", *case.program]
    if (run_folder / "config.toml").exists():
        command += ["--resume", str(run_folder), "--quiet"]
    else:
        _arguments_file(run_folder).write_text(json.dumps(case.arguments))
        command += [*case.arguments, "--out", str(run_folder), "--threads", "1", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with said.joinpath(case.name).open("wb") as errors:  # a pipe that nobody reads would fill up and stop the run
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)


def _arguments_file(run_folder: Path) -> Path:
    return run_folder.with_name(run_folder.name + ".arguments.json")


def _refuse_other_settings(run_folder: Path, case: Case) -> None:
    stored = _arguments_file(run_folder)
    if run_folder.exists() and stored.exists() and tuple(json.loads(stored.read_text())) != case.arguments:
        sys.exit(f"{run_folder} was made with other settings; remove it, or give another --out")
    if changed := _changed_defaults(run_folder, case):
        sys.exit(f"{run_folder} was made with other defaults ({'; '.join(changed)}); remove it, or give another --out")


def _changed_defaults(run_folder: Path, case: Case) -> list[str]:
    """What the same command line would set otherwise than it did when the run was begun."""
    if case.program != ("fedkern.run",) or not (run_folder / "config.toml").exists():
        return []
    stored = load_settings(run_folder)
    now = effective(parse([*case.arguments, "--threads", "1", "--device", stored.device]))
    # What the data decide is filled in when a run begins.
    now = now.replace(clients=stored.clients, augment=now.augment or stored.augment).with_client_threads()
    return now.differences(stored.with_client_threads())


def spread(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """``mean ± standard deviation`` of fractions, in percent; a single value stands alone."""
    centre = f"{scale * mean(values):.{digits}f}"
    return f"{centre} ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else centre


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
