"""Plays the cells of a paper's table within a time budget, and writes the published figures beside ours."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from fedkern.comparison import reproduction_table, verdicts
from fedkern.comparison.boards import Board
from fedkern.comparison.cell_runner import Runner, check_out
from fedkern.comparison.cells import Variant, read_sweep, run_name, spell_value, variants
from fedkern.comparison.found_runs import FoundRun, Group, check_provenance, group_runs, read_runs
from fedkern.comparison.published import NotHere, Paper, PublishedCell
from fedkern.comparison.reproduction_table import Row, by_reason
from fedkern.comparison.run_results import csv_text, label_notes
from fedkern.comparison.verdicts import NO_DATA, NOT_PLAYED, Outcome, Verdict, figure_of, figure_text, name_figure
from fedkern.engine.store.record_files import METRICS, SUMMARY, read_metrics
from fedkern.errors import UserError, describe_error, first_of
from fedkern.files import atomic
from fedkern.files.folder_lock import FolderLock, InUse
from fedkern.listeners.events import Listener
from fedkern.report.figures.curves import Groups
from fedkern.report.pages import html_page
from fedkern.report.tables import human_metric, human_time
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import load_data

REPRODUCTIONS = Path("reproductions")
"""Folder of reproductions without ``out``, each named by its paper, so that the same command continues."""
CSV, MARKDOWN = "reproduction.csv", "reproduction.md"


@dataclass(frozen=True)
class Command:
    """Request of a cell's command: a method, the names of the given settings, and the settings of a run."""

    method: str
    names: frozenset[str]
    make: Callable[[Variant, int], RunConfig]


class OutOfTime(KeyboardInterrupt):
    """The budget is used up: the run stops as after Ctrl-C, and a later command continues."""


class Deadline(Listener):
    """Stops a run between two rounds once the time budget is used up (``seconds`` None: no budget)."""

    essential = True

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._start = time.monotonic()

    def on_round_start(self, round: int, name: str, participants: Sequence[int]) -> None:
        self.check()

    def check(self) -> None:
        if self.seconds_left <= 0:
            raise OutOfTime

    @property
    def seconds_left(self) -> float:
        return math.inf if self.seconds is None else self.seconds - (time.monotonic() - self._start)


class Job:
    """The runs of a paper's command: all points of its sweep with the first seed, the best point with all seeds.

    The folder is named by the command, so that cells of the same command share their runs. ``read`` makes settings of
    the words of a command.
    """

    def __init__(
        self, paper: Paper, entry: PublishedCell, seeds: Sequence[int],
        read: Callable[[Sequence[str]], Command], out: Path, runner: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.entry, self.seeds = entry, tuple(seeds)
        self._read = cache(lambda before: read(paper.words(entry.command, before)))
        before = paper.befores[entry.before] if entry.before else None
        self.before = None if before is None else Job(paper, before, seeds, read, out, runner)
        command = self._command(self.seeds[0])
        self.points = variants([command.method], read_sweep(entry.sweep), command.names)[command.method]
        text = paper.text(entry.command) + ("" if self.before is None else self.before.folder.name)
        self.folder: Path = out / f"{command.method}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        self.runner = Runner(
            self.folder, lambda point, seed: self._command(seed).make(point, seed), command.names, **runner
        )

    def _command(self, seed: int) -> Command:
        return self._read(None if self.before is None else self.before.folder_of(seed, self.before.points[0]))

    def folder_of(self, seed: int, point: Variant) -> Path:
        return self.folder / run_name(point, seed)

    def is_finished(self, seed: int, point: Variant) -> bool:
        return (self.folder_of(seed, point) / SUMMARY).exists()

    def failure_file(self, point: Variant) -> Path:
        """Return the file that says why a point of the sweep failed with the first seed, as at too large a rate."""
        return self.folder / f"{run_name(point, self.seeds[0])}.failed"

    @property
    def total(self) -> int:
        """Number of runs, of which points that are not the best one have only their first seed."""
        return len(self.points) + len(self.seeds) - 1

    @property
    def runs_left(self) -> int:
        """Number of unfinished runs. If every point of a sweep failed, all runs are left."""
        seed, *other_seeds = self.seeds
        swept = len(self.points) > 1
        over = [self.is_finished(seed, point) or (swept and self.failure_file(point).exists()) for point in self.points]
        if (winner := self.best_point() if all(over) or not swept else None) is None:
            return self.total if all(over) else self.total - sum(over)
        return over.count(False) + sum(not self.is_finished(seed, winner) for seed in other_seeds)

    @property
    def seconds(self) -> float:
        """Estimated time of the unfinished runs, with those of ``before``."""
        before = 0.0 if self.before is None else self.before.seconds
        return before + 60 * self.entry.minutes * self.runs_left / self.total

    def play(self, deadline: Deadline) -> None:
        """Run what is not finished.

        Raises:
            InUse: another process plays these runs, or those of ``before``.
            OutOfTime: the budget is used up.
        """
        with atomic.report_unwritable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with FolderLock(self.folder):
            if self.before is not None and self.before.runs_left:
                self.before.play(deadline)
                if self.before.runs_left:
                    raise UserError(f"{self.before.entry.name}: {'; '.join(self.before.runner.failures.values())}")
            if len(self.points) > 1:
                self._play_points()
            if (point := self.best_point()) is None:
                raise UserError(f"Every point of the sweep failed: {self.folder}/*.failed say why.")
            self.runner.play(self.runner.plan([point], self.seeds))

    def _play_points(self) -> None:
        """Run the points of the sweep with the first seed. A point that fails is noted and not run again.

        If all fail for the same reason, such as a missing package, none is noted.
        """
        points = [point for point in self.points if not self.failure_file(point).exists()]
        firsts = self.runner.plan(points, self.seeds[:1])
        try:
            self.runner.play(firsts)
        except Exception:
            firsts = []
            raise
        finally:
            for cell in firsts:
                if (text := self.runner.failures.pop(cell.name, None)) is not None:
                    atomic.write_bytes(self.failure_file(cell.variant), text.encode())

    def best_point(self) -> Variant | None:
        """Return the best point of a finished sweep, None if all failed."""
        if len(self.points) == 1:
            return self.points[0]
        scores, undefined = [], None
        for point, run in self.first_runs():
            try:
                if run is not None:
                    scores.append((verdicts.rate_run(self.entry, run), point))
            except UserError as error:  # a figure that is NaN
                undefined = error
        if undefined is not None and not scores:
            raise undefined
        return max(scores, key=lambda score: score[0], default=((), None))[1]

    def first_runs(self) -> list[tuple[Variant, FoundRun | None]]:
        """Return every point of the sweep with its run of the first seed, None if that failed."""
        return [(point, self.runs(point).get(self.seeds[0])) for point in self.points]

    def histories(self) -> Groups:
        return {
            ", ".join(filter(None, (_point(point), f"seed {seed}"))): [read_metrics(folder)]
            for point in self.points
            for seed in self.seeds
            if ((folder := self.folder_of(seed, point)) / METRICS).exists()
        }

    def runs(self, point: Variant) -> dict[int, FoundRun]:
        seeds = [seed for seed in self.seeds if self.is_finished(seed, point)]
        return {cell.seed: self.runner.read(cell) for cell in self.runner.plan([point], seeds)}


@dataclass
class Reproduction:
    """A paper's cells, with their runs and the table of their figures in a folder.

    Attributes:
        read: makes settings of the words of a command.
        board: makes a receiver of a cell's progress.
        budget: seconds, or None.
        tell: receives lines for people.
        absent: why cells have no data here, by cell name.
        failures: messages by cell name.
    """

    paper: Paper
    out: Path
    read: Callable[[Sequence[str]], Command]
    board: Callable[[], Board] = Board
    budget: float | None = None
    tell: Callable[[str], object] = lambda text: None
    absent: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    tracebacks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_out(self.out)
        self.deadline = Deadline(self.budget)
        self.jobs: dict[str, Job] = {}
        self.recorded: dict[str, Group] = {}
        runner = {"tracebacks": self.tracebacks, "listener": self.deadline}
        mistakes = [*self.paper.mistakes]
        for cell in self.paper.cells:
            try:
                if cell.runs:
                    self._read_recorded(cell, self.paper.find_runs(cell))
                else:
                    self.jobs[cell.name] = Job(self.paper, cell, cell.seeds, self.read, self.out, runner)
            except NotHere as error:
                self.absent[cell.name] = str(error)
            except UserError as error:
                mistakes.append(f'cell "{cell.name}": {error}')
        self.paper.refuse(mistakes)

    def _read_recorded(self, cell: PublishedCell, folders: Sequence[Path]) -> None:
        """Read the recorded runs of a cell, or note why they cannot be read or are not those of one cell."""
        try:
            runs, unfinished = read_runs(folders)
            groups = group_runs(runs)
            if unfinished:
                raise UserError(f"{first_of(unfinished, 3)} is not finished: finish the run, or leave it out of runs.")
            if len(groups) > 1:
                labels = first_of([group.label for group in groups], 3)
                raise UserError(f"its runs are of several methods or settings ({labels}): name those of one.")
            self.recorded[cell.name] = groups[0]
        except UserError as error:
            self.failures[cell.name] = str(error)

    def select(self, names: Sequence[str] = (), table: str | None = None) -> list[PublishedCell]:
        """Return the cells of a table whose names match one of ``names``, which may be patterns such as ``2NN*``."""
        cells = self.paper.cells
        tables = dict.fromkeys(cell.table for cell in cells)
        if table is not None and table not in tables:
            raise UserError(f'{self.paper.name} has no table "{table}", but {", ".join(tables)}.')
        for name in names:
            if not any(fnmatchcase(cell.name, name) for cell in cells):
                self.paper.find(name)  # raises
        matching = [cell for cell in cells if not names or any(fnmatchcase(cell.name, name) for name in names)]
        if chosen := [cell for cell in matching if table in (None, cell.table)]:
            return chosen
        raise UserError(f'table "{table}" of {self.paper.name} has no cell {" or ".join(names)}: leave --table out.')

    def plan(self, cells: Sequence[PublishedCell]) -> tuple[list[PublishedCell], list[str]]:
        """Return the cells that have runs left, the most expensive last, and lines on all cells for people.

        Cells without data are noted as absent.
        """
        reasons = dict[str, str]()
        recorded = [cell.name for cell in cells if cell.name in self.recorded]
        lines = [f"recorded: {name} ({len(self.recorded[name].runs)} runs)" for name in recorded]
        jobs = {cell.name: self.jobs[cell.name] for cell in cells if cell.name in self.jobs}
        for name, job in jobs.items():
            try:
                if job.runs_left and (reason := _without_data(job, reasons)):
                    self.absent[name] = reason
            except UserError as error:
                raise UserError(f'{self.paper.name}, cell "{name}": {error}') from None
        for reason, names in by_reason((self.absent.get(cell.name, ""), cell.name) for cell in cells).items():
            lines.append(f"{NO_DATA}: {first_of(names, 3)} ({reason})")
        planned = []
        for name, job in sorted(jobs.items(), key=lambda item: item[1].seconds):
            if name in self.absent:
                continue
            left = job.runs_left
            planned += [self.paper.find(name)] if left else []
            about = f", about {human_time(job.seconds)} left" if job.seconds else ""
            left_words = f"next: {name} ({job.total - left} of {job.total} runs finished{about})"
            lines.append(left_words if left else f"finished: {name}")
        return planned, lines

    def play(self, cells: Sequence[PublishedCell]) -> None:
        """Run the cells whose estimates fit into the rest of the budget, and write the table after each.

        Failed cells are noted. Cells that another process plays are skipped.
        """
        beyond = []
        try:
            for cell in cells:
                if (seconds := self.jobs[cell.name].seconds) > self.deadline.seconds_left:
                    beyond.append(f"{cell.name} (about {human_time(seconds)})")
                    continue
                self.deadline.check()
                self.tell(f"{cell.name}:")
                if self._play(cell):
                    self.write()
        except OutOfTime:
            self.tell("The budget is used up: the same command goes on.")
        if beyond:
            self.tell(f"beyond the budget: {first_of(beyond, 3)}")

    def _play(self, cell: PublishedCell) -> bool:
        """Run a cell, False if another process does."""
        job, board = self.jobs[cell.name], self.board()
        job.runner.board = board
        if job.before is not None:
            job.before.runner.board = board
        try:
            job.play(self.deadline)
        except InUse:
            self.tell("  another process plays it")
            return False
        except Exception as error:
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in atomic.FULL):
                raise
            self.failures[cell.name] = str(error) if isinstance(error, UserError) else describe_error(error)
        finally:
            board.close()
        for text in job.runner.failures.values():
            self.failures.setdefault(cell.name, text)
        return True

    def finished_runs(self, cell: PublishedCell) -> dict[int, FoundRun]:
        """Return the runs of a cell by seed, of a sweep those of the best point, {} unless all are finished."""
        if (job := self.jobs.get(cell.name)) is None:
            return self.recorded[cell.name].runs if cell.name in self.recorded else {}
        winner = None if job.runs_left else job.best_point()
        return {} if winner is None else job.runs(winner)

    def _outcome(self, cell: PublishedCell, runs: Mapping[int, FoundRun]) -> Outcome:
        effects = []
        if (job := self.jobs.get(cell.name)) is not None and len(job.points) > 1:
            winner = job.best_point()
            effects = [
                f"{_point(point)}: {_reached_text(cell, run)}{' (chosen)' * (point == winner)}"
                for point, run in job.first_runs()
            ]
        seconds = [run.summary["seconds"] for run in runs.values()]
        # No file of a run has a time: that of the summary is kept only by copies with cp -p or rsync -t.
        last_finish = max((run.folder / SUMMARY).stat().st_mtime for run in runs.values())
        return Outcome(
            {seed: figure_of(cell, run) for seed, run in runs.items()},
            {seed: float(run.records[-1]["round"]) for seed, run in runs.items()},
            "; ".join(effects),
            None if None in seconds else sum(seconds),
            bytes=_mean_bytes(runs.values(), "total"),
            up=_mean_bytes(runs.values(), "up"),
            build=", ".join(dict.fromkeys(filter(None, map(_build, runs.values())))),
            date=datetime.fromtimestamp(last_finish, UTC).date().isoformat(),
            recorded=self.recorded[cell.name].label if job is None else "",
        )

    def rows(self) -> list[Row]:
        """Return a row for every cell of the paper, and note unreadable outcomes as failures."""
        cells = {cell.name: cell for cell in self.paper.cells}
        runs, outcomes, curves = dict[str, Mapping[int, FoundRun]](), dict[str, Outcome](), dict[str, Groups]()
        for name, cell in cells.items():
            job = self.jobs.get(name)
            try:
                if found := self.finished_runs(cell):
                    cells[name] = cell = name_figure(cell, next(iter(found.values())))
                    outcomes[name], runs[name] = self._outcome(cell, found), found
                if cell.goal is not None:
                    records = {f"seed {seed}": [run.records] for seed, run in found.items()}
                    curves[name] = records if job is None else job.histories()
            except UserError as error:
                self.failures[name] = str(error)
        rows = []
        for name, cell in cells.items():
            outcome, job, notes = outcomes.get(name), self.jobs.get(name), list[str]()
            if outcome is not None:
                base, base_outcome = cells.get(cell.baseline), outcomes.get(cell.baseline)
                if base is not None and base_outcome is not None:
                    pairs, notes = _pair_seeds(cell, base, runs)
                    base_outcome = replace(base_outcome, values={seed: base_outcome.values[seed] for seed in pairs})
                verdict = verdicts.judge_cell(cell, outcome, base_outcome, None if base is None else base.published)
            elif name in self.absent:
                verdict = Verdict(NO_DATA, self.absent[name])
            elif job is None or name in self.failures:
                verdict = Verdict(NOT_PLAYED, self.failures.get(name, ""))
            else:
                done = job.total - job.runs_left
                verdict = Verdict(NOT_PLAYED, f"{done} of {job.total} runs finished" * bool(done))
            folder = "" if job is None or name in self.absent else str(job.folder)
            rows.append(Row(cell, verdict, outcome, folder or ", ".join(cell.runs), curves.get(name, {}), notes))
        return rows

    def write(self) -> list[Path]:
        """Write the table as Markdown, CSV and HTML, each completely or not at all, and return the files."""
        rows = self.rows()
        with atomic.report_unwritable(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        table = reproduction_table.text_table(self.paper, rows)
        texts = {MARKDOWN: table.markdown(), CSV: csv_text([row.values() for row in rows])}
        for name, text in texts.items():
            atomic.write_bytes(self.out / name, text.encode())
        page = html_page.write_page(reproduction_table.page(self.paper, rows), self.out)
        return [*(self.out / name for name in texts), page]


def _pair_seeds(
    cell: PublishedCell, base: PublishedCell, runs: Mapping[str, Mapping[int, FoundRun]]
) -> tuple[list[int], list[str]]:
    """Return the seeds in which a cell can be compared with its baseline, and sentences on reasons against it."""
    if cell.figure != base.figure:
        return [], [f"{cell.name} is not compared with {base.name}, whose main figure is {base.figure}."]
    try:
        if cell.runs or base.runs:
            check_provenance([*runs[cell.name].values(), *runs[base.name].values()], code=False)
    except UserError as error:
        return [], [f"{cell.name} is not compared with {base.name}: {error}"]
    groups = [Group(name, "", {**runs[name]}) for name in (base.name, cell.name)]
    shared_seeds = groups[1].shared_seeds(groups[0])
    if not shared_seeds:
        return [], [f"{cell.name} is not compared with {base.name}, as they have no seed in common."]
    return [seed for seed, is_other in shared_seeds.items() if not is_other], label_notes(groups)


def _mean_bytes(runs: Iterable[FoundRun], way: str) -> float | None:
    sizes = [run.summary.get("bytes", {}).get(way) for run in runs]
    return None if None in sizes else fmean(sizes)


def _build(run: FoundRun) -> str:
    versions = run.summary.get("versions", {})
    return " ".join(str(versions[name]) for name in ("fedkern", "commit") if name in versions)


_OF_DATA = ("data", "data_options", "clients", "partition", "train_samples", "public_samples", "correlation")
"""Settings that decide whether data can be loaded."""


def _without_data(job: Job, reasons: dict[str, str]) -> str:
    """Return why a job has no data here, or "". ``reasons`` caches answers for jobs on the same data."""
    config = job.runner.make(job.points[0], job.seeds[0])
    key = repr([(name, getattr(config, name)) for name in _OF_DATA])
    if key not in reasons:
        try:
            load_data(config, masks=False)
            reasons[key] = ""
        except UserError as error:
            reasons[key] = str(error)
    return reasons[key]


def _point(point: Variant) -> str:
    return ", ".join(f"{name} {spell_value(value)}" for name, value in point.swept.items())


def _reached_text(cell: PublishedCell, run: FoundRun | None) -> str:
    """Return the figure of a run for people, or its best value if the run misses the target."""
    if run is None:
        return "failed"
    if (value := figure_of(cell, run)) is not None:
        return figure_text(cell, value)
    assert cell.goal is not None
    return f"misses the target with {human_metric(cell.goal.figure, verdicts.best_value(cell.goal.figure, run))}"
