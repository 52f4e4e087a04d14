"""What finished image-text runs are good for: a table with a row for every method, on seen and on unseen clients.

    python -m benchmarks.studies.study_downstream RUN... [--out NAME]

Runs of one method with the same settings but for the seed share a row.  Every task writes its figures into the run
folder and is not repeated; ``--out NAME`` writes ``benchmarks/studies/results/NAME.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.studies.study import publish, spread, table
from fedkern.cli.command_parser import parse
from fedkern.cli.commands import downstream
from fedkern.engine.store.records import read_summary
from fedkern.settings.config import RunConfig
from fedkern.settings.stored import load_settings

TASKS: Mapping[str, tuple[str, ...]] = {
    "retrieval": (),
    "zero-shot": (),
    "zero-shot of colours": ("--data-option", "labels=colour"),
    "probe": ("--shots", "5,all"),
    "decode": ("--epochs", "5", "--samples", "1000"),
}
SETS = ("seen", "unseen")


@dataclass(frozen=True)
class Figure:
    """A column: its heading, the task it comes from, its name there and the shots of a probe."""

    heading: str
    task: str
    name: str
    shots: Any = None


FIGURES = (
    Figure("R@1 image to text", "retrieval", "i2t_r1"),
    Figure("R@5 image to text", "retrieval", "i2t_r5"),
    Figure("R@10 image to text", "retrieval", "i2t_r10"),
    Figure("R@1 text to image", "retrieval", "t2i_r1"),
    Figure("R@5 text to image", "retrieval", "t2i_r5"),
    Figure("R@10 text to image", "retrieval", "t2i_r10"),
    Figure("zero-shot accuracy", "zero-shot", "accuracy"),
    Figure("zero-shot accuracy of colours", "zero-shot of colours", "accuracy"),
    Figure("5-shot accuracy", "probe", "accuracy", 5),
    Figure("linear probe accuracy", "probe", "accuracy", "all"),
    Figure("linear probe AUC", "probe", "auc", "all"),
    Figure("Dice of the digits", "decode", "dice"),
)


def figures(folder: Path) -> dict[str, float]:
    """The figures of a finished run, computed where they are not there yet: ``"seen: R@1 image to text"`` and so on.

    Raises:
        SystemExit: a task failed; its sentence is repeated.
    """
    values: dict[str, float] = {}
    for task, words in TASKS.items():
        rows = json.loads(_result(folder, task, words).read_text())["rows"]
        for figure in (one for one in FIGURES if one.task == task):
            for row in rows:
                if row["set"] in SETS and row.get("shots") == figure.shots and figure.name in row:
                    values[f"{row['set']}: {figure.heading}"] = float(row[figure.name])
    return values


def _result(folder: Path, task: str, words: Sequence[str]) -> Path:
    command = [task.partition(" ")[0], str(folder), *words]
    request = parse(command)
    path, settings = folder / downstream.result_name(request), json.loads(json.dumps(dict(request.arguments)))
    if not path.exists() or json.loads(path.read_text())["settings"] != settings:
        command = [sys.executable, "-m", "fedkern.run", *command, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit((done.stderr.strip().splitlines() or [f"{task} failed on {folder}"])[-1])
    return path


def label(folder: Path) -> str:
    """The method and, where they differ from its defaults, its options."""
    config = load_settings(folder, device="cpu")
    usual = RunConfig.make(config.method, data=config.data).options
    changed = [f"{name}={value}" for name, value in config.options.items() if usual.get(name) != value]
    return " ".join([config.method, *sorted(changed)])


def collect(named: Mapping[str, Iterable[Path]]) -> dict[str, list[dict[str, float]]]:
    """The figures of every run by row."""
    return {name: [figures(folder) for folder in folders] for name, folders in named.items()}


def page(runs_of: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A table for each group of clients, the best mean of a column in bold."""
    parts = []
    for which in SETS:
        columns = [
            one.heading for one in FIGURES if all(f"{which}: {one.heading}" in runs[0] for runs in runs_of.values())
        ]
        means = {
            heading: {name: mean(run[f"{which}: {heading}"] for run in runs) for name, runs in runs_of.items()}
            for heading in columns
        }
        rows = []
        for name, runs in runs_of.items():
            cells = []
            for heading in columns:
                shown = spread([run[f"{which}: {heading}"] for run in runs])
                best = means[heading][name] == max(means[heading].values())
                cells.append(f"**{shown}**" if best else shown)
            rows.append([name, *cells])
        parts.append(f"## {which.capitalize()} clients\n\n{table(['', *columns], rows)}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.study_downstream", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", help="name of the results")
    args = parser.parse_args()
    named: dict[str, list[Path]] = {}
    for folder in args.runs:
        named.setdefault(label(folder), []).append(folder)
    runs_of = collect(named)
    if args.out is None:
        print(page(runs_of))
        return
    seeds = max(len(folders) for folders in named.values())
    summary = read_summary(args.runs[0])
    assert summary is not None  # the tasks above have read the run
    about = (
        f"Frozen encoders of finished runs on {summary['data']}, mean and standard deviation over "
        f"{seeds} seeds, in per cent. Chance: R@1 0.2, accuracy 10, of colours 17, AUC 50."
    )
    publish(args.out, "Downstream tasks", about, page(runs_of), {"figures": runs_of}, summary["versions"])


if __name__ == "__main__":
    main()
