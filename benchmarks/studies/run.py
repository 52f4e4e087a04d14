"""Play a study and store what the pages read.

    python -m benchmarks.studies.run NAME [flags of `fedkern reproduce`]

NAME is a file of cells in this folder, ``NAME.toml``, a file of your own, or a paper that fedkern ships.  The command
plays it as ``fedkern reproduce`` does, goes on where it stopped, and writes ``results/NAME.json`` beside the file: the
rows of ``reproduce --json``, each with its runs by seed.  A run has its final figures, its traffic and its curve.
Cells that are not played keep their former row.

A file may name programs that look at finished runs: ``after`` in ``[words]``, commands behind ``python -m`` that are
separated by semicolons.  ``{run}`` stands for the run's folder.  Their JSON answers are stored with the run.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import page
from fedkern.cli import command_parser
from fedkern.cli.commands import reproduce
from fedkern.comparison import published
from fedkern.comparison.found_runs import FoundRun, Group, main_figures
from fedkern.comparison.reproduction import REPRODUCTIONS, Reproduction
from fedkern.errors import UserError

AFTER, LATE = "after", 5
"""The key of the programs' answers; the evaluated rounds at the end whose mean is stored beside the last figure."""


def read_study(name: str) -> published.Paper:
    """Return the cells of a file in this folder, of another file, or of a paper that fedkern ships."""
    is_file = name in published.list_papers() or name.endswith(".toml")
    return published.read_paper(name if is_file else str(page.STUDIES / f"{name}.toml"))


def commands_after(paper: published.Paper) -> list[str]:
    """Return the commands that a study plays on every finished run."""
    return [text.strip() for text in paper.phrases.get(AFTER, "").split(";") if text.strip()]


def ask(command: str, folder: Path) -> Any:
    """Return the JSON answer of a program about a run, or exit with a failing program's last line."""
    words = [word.replace("{run}", str(folder)) for word in shlex.split(command)]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit((done.stderr.strip().splitlines() or [f"{command} failed on {folder}"])[-1])
    return json.loads(done.stdout)


def curve_of(run: FoundRun) -> dict[str, list[Any]]:
    """Return the first main figure, bytes and simulated seconds so far of evaluated rounds."""
    main = main_figures([Group("", run.method, {run.seed: run})])[0]
    records = [record for record in run.records if main in record]
    names = ("round", main, "bytes_up", "simulated_seconds")
    return {name: [record[name] for record in records] for name in names if name in records[0]}


def stored_run(run: FoundRun, commands: Sequence[str]) -> dict[str, Any]:
    """Return the stored results of a finished run."""
    last = {name: value for name, value in run.records[-1].items() if isinstance(value, int | float)}
    traffic = {name: value for name, value in run.summary["bytes"].items() if isinstance(value, int | float)}
    answers = {AFTER: {command: ask(command, run.folder) for command in commands}} if commands else {}
    _, figures, *_ = (curve := curve_of(run)).values()
    late = fmean(figures[-LATE:])  # figures swing from round to round
    return {"metrics": {**last, **run.metrics}, "late": late, "bytes": traffic, "curve": curve, **answers}


def write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of a study, one a line, where a row without runs keeps the former one."""
    former = {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    lines = [json.dumps(row if row["runs"] else former.get(row["name"], row), ensure_ascii=False) for row in rows]
    path.write_text('{"rows": [\n' + ",\n".join(lines) + "\n]}\n")


def main(words: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    if not words or words[0].startswith("-") or {"-h", "--help"} & set(words):
        sys.exit(__doc__)
    paper, flags = read_study(words[0]), words[1:]
    shipped = paper.folder == published.PAPERS
    place = paper.name if shipped else f"{paper.folder / paper.name}.toml"
    request = command_parser.parse_words(["reproduce", place, *flags])
    if (code := reproduce.play(request)) > 1:  # interrupted
        return code
    out = request.out or REPRODUCTIONS / paper.name
    reproduction = Reproduction(paper, out, lambda text: reproduce.command_of(request, text))
    rows: list[dict[str, Any]] = []
    for row in reproduction.rows():
        runs = {} if row.outcome is None else reproduction.finished_runs(row.cell)
        stored = {str(seed): stored_run(run, commands_after(paper)) for seed, run in runs.items()}
        rows.append({**row.values(), "runs": stored})
    results = page.RESULTS if shipped else paper.folder / "results"
    results.mkdir(exist_ok=True)
    write_results(results / f"{paper.name}.json", rows)
    return code


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
