"""Plays the cells of a paper's table within a budget of time, and writes the published figures beside ours."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any

from fedkern.comparison import reproduction_table
from fedkern.comparison.cell_runner import Board, Runner, check_out
from fedkern.comparison.cells import Variant, read_sweep, run_name, variants, word
from fedkern.comparison.found_runs import FoundRun
from fedkern.comparison.published import Before, NotHere, Paper, PublishedCell
from fedkern.comparison.reproduction_table import Row, by_reason
from fedkern.comparison.verdicts import (
    NO_DATA,
    NOT_PLAYED,
    Outcome,
    Verdict,
    best,
    figure_of,
    judge,
    quality,
    shown,
)
from fedkern.engine.store.records import METRICS, SUMMARY, read_metrics
from fedkern.errors import UserError, described, first_of
from fedkern.files import atomic
from fedkern.files.folder_lock import FolderLock, InUse
from fedkern.listeners.events import Listener
from fedkern.report.figures.comparison_plot import Groups
from fedkern.report.pages import html_page
from fedkern.report.tables import human_metric, human_time
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import load_data

REPRODUCTIONS = Path("reproductions")
"""Folder of reproductions without ``out``; each is named by its paper, so that the same command goes on."""
CSV, MARKDOWN = "reproduction.csv", "reproduction.md"
POLL = 2.0
"""Seconds between two looks whether another process has played what a cell needs beforehand."""


@dataclass(frozen=True)
class Command:
    """What the words of a cell's command ask for: a method, the names of what they set, and the settings of a run."""

    method: str
    names: frozenset[str]
    make: Callable[[Variant, int], RunConfig]


class OutOfTime(KeyboardInterrupt):
    """The budget is used up: the run stops as after Ctrl-C, and a later command goes on with it."""


class Deadline(Listener):
    """Stops a run between two rounds once the budget of time is used up; ``seconds`` None: there is no budget."""

    essential = True

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._start = time.monotonic()

    def on_round_start(self, round: int, name: str, participants: Sequence[int]) -> None:
        self.check()

    def check(self) -> None:
        """Raises OutOfTime once the budget is used up."""
        if self.seconds is not None and time.monotonic() - self._start >= self.seconds:
            raise OutOfTime


class Job:
    """The runs of a command of a paper: all points of its sweep with the first seed, the best point with all seeds.

    The folder is named by the command, so that cells of the same command share their runs.

    Args:
        paper: has the entry, and what is to be run before.
        entry: has the command.
        seeds: at least one.
        read: makes settings of the words of a command.
        out: folder of the reproduction.
        runner: other arguments of the `Runner`.
    """

    def __init__(
        self, paper: Paper, entry: PublishedCell | Before, seeds: Sequence[int],
        read: Callable[[Sequence[str]], Command], out: Path, runner: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.paper, self.entry, self.seeds, self._read = paper, entry, tuple(seeds), read
        name, sweep = (entry.before, entry.sweep) if isinstance(entry, PublishedCell) else ("", ())
        self.before = Job(paper, paper.befores[name], seeds, read, out, runner) if name else None
        self._commands: dict[Path | None, Command] = {}
        first = self._command(self.seeds[0])
        self.points = variants([first.method], read_sweep(sweep), first.names)[first.method]
        text = paper.text(entry.command) + ("" if self.before is None else self.before.folder.name)
        self.folder: Path = out / f"{first.method}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        self.runner = Runner(
            self.folder, lambda point, seed: self._command(seed).make(point, seed), first.names, **runner
        )

    def _command(self, seed: int) -> Command:
        before = None if self.before is None else self.before.folder_of(seed, self.before.points[0])
        if before not in self._commands:
            self._commands[before] = self._read(self.paper.words(self.entry.command, before))
        return self._commands[before]

    def folder_of(self, seed: int, point: Variant) -> Path:
        """The run folder of a point and a seed."""
        return self.folder / run_name(point, seed)

    def finished(self, seed: int, point: Variant) -> bool:
        """Whether the run of a seed is finished."""
        return (self.folder_of(seed, point) / SUMMARY).exists()

    def failed(self, point: Variant) -> Path:
        """The file that says why a point of the sweep failed with the first seed, as at too large a rate."""
        return self.folder / f"{run_name(point, self.seeds[0])}.failed"

    @property
    def count(self) -> tuple[int, int]:
        """Number of the runs that are finished, and of all; runs of points that are not the best one do not count.

        Where every point of a sweep has failed, none counts.
        """
        return self.total - len(self.left()), self.total

    @property
    def total(self) -> int:
        """Number of all runs."""
        return len(self.points) + len(self.seeds) - 1

    @property
    def complete(self) -> bool:
        """Whether all runs are finished."""
        return not self.left()

    def left(self) -> dict[tuple[object, ...], float]:
        """Estimated minutes of every run that is not finished, by its folder.

        Until a sweep's best point is known, runs of it are named by what chooses it.
        """
        first, *others = self.seeds
        swept = len(self.points) > 1
        over = [self.finished(first, point) or (swept and self.failed(point).exists()) for point in self.points]
        best = self.chosen() if all(over) or not swept else None
        again = all(over) and best is None
        runs: list[tuple[object, ...]] = [
            (self.folder_of(first, point),) for point, done in zip(self.points, over, strict=True) if again or not done
        ]
        if best is not None:
            runs += [(self.folder_of(seed, best),) for seed in others if not self.finished(seed, best)]
        else:
            assert isinstance(self.entry, PublishedCell)
            chooser = self.entry.select == "validation" or (self.entry.figure, self.entry.target)
            runs += [(self.folder, self.entry.sweep, chooser, seed) for seed in others]
        return dict.fromkeys(runs, self.entry.minutes / self.total)

    def play(self, deadline: Deadline) -> None:
        """Plays the runs that are not finished.

        Raises:
            InUse: another process plays them.
            UserError: a run cannot be played, or all failed.
            OutOfTime: the budget is used up.
        """
        with atomic.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with FolderLock(self.folder):
            while self.before is not None and not self.before.complete:
                try:
                    self.before.play(deadline)
                except InUse:
                    deadline.check()
                    time.sleep(POLL)
                else:
                    if not self.before.complete:
                        raise UserError(f"{self.before.entry.name}: {'; '.join(self.before.runner.failures.values())}")
            if len(self.points) > 1:
                self._play_points()
            if (point := self.chosen()) is None:
                raise UserError(f"Every point of the sweep failed: {self.folder}/*.failed say why.")
            self.runner.play(self.runner.plan([point], self.seeds))

    def _play_points(self) -> None:
        """Plays the points of the sweep with the first seed; one that fails is noted and not played again.

        Where all fail for the same reason, such as a missing package, no point is to blame and none is noted.
        """
        points = [point for point in self.points if not self.failed(point).exists()]
        firsts = self.runner.plan(points, self.seeds[:1])
        try:
            self.runner.play(firsts)
        except Exception:
            firsts = []
            raise
        finally:
            for cell in firsts:
                if (text := self.runner.failures.pop(cell.name, None)) is not None:
                    atomic.write_bytes(self.failed(cell.variant), text.encode())

    def chosen(self) -> Variant | None:
        """The best point of the sweep, all of whose points are played; None where all failed."""
        if len(self.points) == 1:
            return self.points[0]
        assert isinstance(self.entry, PublishedCell)
        scores, undefined = [], None
        for point, run in self.first_runs():
            try:
                if run is not None:
                    scores.append((quality(self.entry, run), point))
            except UserError as error:  # a figure that is NaN
                undefined = error
        if undefined is not None and not scores:
            raise undefined
        return max(scores, key=lambda each: each[0], default=((), None))[1]

    def first_runs(self) -> list[tuple[Variant, FoundRun | None]]:
        """Every point of the sweep with its run of the first seed; None where that failed."""
        return [(point, self.runs(point).get(self.seeds[0])) for point in self.points]

    def histories(self) -> Groups:
        """Records of the rounds of every run, finished or not, by the point of the sweep and the seed."""
        histories = {}
        for point in self.points:
            for seed in self.seeds:
                if ((folder := self.folder_of(seed, point)) / METRICS).exists():
                    histories[", ".join(filter(None, (_point(point), f"seed {seed}")))] = [read_metrics(folder)]
        return histories

    def runs(self, point: Variant) -> dict[int, FoundRun]:
        """The finished runs of a point, by seed."""
        seeds = [seed for seed in self.seeds if self.finished(seed, point)]
        return {cell.seed: self.runner.read(cell) for cell in self.runner.plan([point], seeds)}


@dataclass
class Reproduction:
    """A paper's cells, with their runs and the table of their figures in a folder.

    Attributes:
        read: makes settings of the words of a command.
        board: makes a receiver of a cell's progress.
        budget: seconds, or None.
        tell: receives lines for people.
        absent: why cells have no data here, by the cell's name.
        failures: what went wrong, by the cell's name.
        tracebacks: of runs in which Python code failed.

    Raises:
        UserError: a command is none, or run folders have other settings.
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
        runner = {"tracebacks": self.tracebacks, "listener": self.deadline}
        for cell in self.paper.cells:
            try:
                self.jobs[cell.name] = Job(self.paper, cell, cell.seeds, self.read, self.out, runner)
            except NotHere as error:
                self.absent[cell.name] = str(error)
            except UserError as error:
                raise UserError(f'{self.paper.name}, cell "{cell.name}": {error}') from None

    def select(self, names: Sequence[str] = (), table: str | None = None) -> list[PublishedCell]:
        """The cells whose names are among ``names``, which may be patterns such as ``2NN*``, in a table; or all.

        Raises:
            UserError: there is no such cell or table.
        """
        cells = self.paper.cells
        tables = dict.fromkeys(cell.table for cell in cells)
        if table is not None and table not in tables:
            raise UserError(f'{self.paper.name} has no table "{table}", but {", ".join(tables)}.')
        for name in names:
            if not any(fnmatchcase(cell.name, name) for cell in cells):
                self.paper.find(name)  # raises
        chosen = [
            cell
            for cell in cells
            if table in (None, cell.table) and (not names or any(fnmatchcase(cell.name, name) for name in names))
        ]
        if not chosen:
            raise UserError(
                f'table "{table}" of {self.paper.name} has no cell {" or ".join(names)}: leave --table out.'
            )
        return chosen

    def plan(self, cells: Sequence[PublishedCell]) -> tuple[list[PublishedCell], list[str]]:
        """Those cells that have runs left and fit the budget, the dearest last; and lines on all cells for people.

        Cells without data are noted as absent.
        """
        reasons, left = dict[str, str](), dict[str, dict[tuple[object, ...], float]]()
        for cell in cells:
            try:
                if (job := self.jobs.get(cell.name)) is not None:
                    left[cell.name] = job.left()
                    if left[cell.name] and (reason := _without_data(job, reasons)):
                        self.absent[cell.name] = reason
            except UserError as error:
                raise UserError(f'{self.paper.name}, cell "{cell.name}": {error}') from None
        allowed, lines, seconds, planned = [], list[str](), 0.0, dict[tuple[object, ...], float]()
        for reason, names in by_reason((self.absent.get(cell.name, ""), cell.name) for cell in cells).items():
            lines.append(f"{NO_DATA}: {first_of(names, 3)} ({reason})")
        jobs = {cell.name: self.jobs[cell.name] for cell in cells if cell.name not in self.absent}
        needed = {
            name: left[name] if job.before is None else job.before.left() | left[name] for name, job in jobs.items()
        }
        for name in sorted(jobs, key=lambda name: sum(needed[name].values())):
            job = jobs[name]
            if not left[name]:
                lines.append(f"finished: {name}")
                continue
            cost = 60 * sum(max(0.0, minutes - planned.get(run, 0.0)) for run, minutes in needed[name].items())
            fits = self.budget is None or seconds + cost <= self.budget
            done = job.total - len(left[name])
            what = "next" if fits else "beyond the budget"
            lines.append(f"{what}: {name} ({done} of {job.total} runs finished, about {human_time(cost)} left)")
            if fits:
                seconds += cost
                planned |= {run: max(minutes, planned.get(run, 0.0)) for run, minutes in needed[name].items()}
                allowed.append(self.paper.find(name))
        return allowed, lines

    def play(self, cells: Sequence[PublishedCell]) -> None:
        """Plays cells until the budget is used up, and writes the table after each; failed cells are noted.

        Cells that another process plays are left to it.
        """
        waiting, before = list(cells), -1
        try:
            while waiting and len(waiting) != before:
                before, busy = len(waiting), []
                for cell in waiting:
                    self.deadline.check()
                    self.tell(f"{cell.name}:")
                    if self._play(cell):
                        self.write()
                    else:
                        busy.append(cell)
                waiting = busy
        except OutOfTime:
            self.tell("The budget is used up: the same command goes on.")

    def _play(self, cell: PublishedCell) -> bool:
        """Plays a cell; False where another process does."""
        job, board = self.jobs[cell.name], self.board()
        for each in _needed(job):
            each.runner.board = board
        try:
            job.play(self.deadline)
        except InUse:
            self.tell("  another process plays it")
            return False
        except Exception as error:
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in atomic.FULL):
                raise
            self.failures[cell.name] = str(error) if isinstance(error, UserError) else described(error)
        finally:
            board.close()
        for text in job.runner.failures.values():
            self.failures.setdefault(cell.name, text)
        return True

    def outcome(self, cell: PublishedCell) -> Outcome | None:
        """What the runs of a cell give; None while one is not finished, or where they do not tell the figure."""
        try:
            return self._outcome(cell)
        except UserError as error:
            self.failures[cell.name] = str(error)
            return None

    def _outcome(self, cell: PublishedCell) -> Outcome | None:
        job = self.jobs.get(cell.name)
        point = None if job is None or not job.complete else job.chosen()
        if job is None or point is None:
            return None
        runs = job.runs(point)
        if len(runs) < len(job.seeds):
            return None
        firsts = job.first_runs() if len(job.points) > 1 else []
        effects = [f"{_point(each)}: {_reached(cell, run)}{' (chosen)' * (each == point)}" for each, run in firsts]
        return Outcome(
            {seed: figure_of(cell, run) for seed, run in runs.items()},
            {seed: float(run.records[-1]["round"]) for seed, run in runs.items()},
            "; ".join(effects),
            sum(run.summary["seconds"] for run in runs.values()),
            bytes=fmean(run.summary["bytes"]["total"] for run in runs.values()),
            up=fmean(run.summary["bytes"]["up"] for run in runs.values()),
            build=", ".join(dict.fromkeys(_build(run) for run in runs.values())),
            date=max(_finished(run) for run in runs.values()),
        )

    def _curves(self, cell: PublishedCell) -> Groups:
        """Records of the runs of a cell with a target; none where they cannot be read, which is noted."""
        job = self.jobs.get(cell.name)
        try:
            return {} if job is None or cell.goal is None else job.histories()
        except UserError as error:
            self.failures[cell.name] = str(error)
            return {}

    def rows(self) -> list[Row]:
        """A row for every cell of the paper."""
        outcomes = {cell.name: self.outcome(cell) for cell in self.paper.cells}
        curves = {cell.name: self._curves(cell) for cell in self.paper.cells}
        rows = []
        for cell in self.paper.cells:
            outcome, baseline = outcomes[cell.name], outcomes.get(cell.baseline)
            if outcome is not None:
                published = self.paper.find(cell.baseline).published if cell.baseline else None
                verdict = judge(cell, outcome, baseline, published)
            elif cell.name in self.absent:
                verdict = Verdict(NO_DATA, self.absent[cell.name])
            elif cell.name in self.failures:
                verdict = Verdict(NOT_PLAYED, self.failures[cell.name])
            else:
                done, total = self.jobs[cell.name].count
                verdict = Verdict(NOT_PLAYED, f"{done} of {total} runs finished" * bool(done))
            job = None if cell.name in self.absent else self.jobs[cell.name]
            rows.append(Row(cell, verdict, outcome, "" if job is None else str(job.folder), curves[cell.name]))
        return rows

    def write(self) -> list[Path]:
        """Writes the table as Markdown, CSV and HTML, each completely or not at all, and returns the files.

        Raises:
            UserError: the folder cannot be written.
        """
        rows = self.rows()
        with atomic.writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        table = reproduction_table.text_table(self.paper, rows)
        texts = {MARKDOWN: table.markdown(), CSV: reproduction_table.to_csv(rows)}
        for name, text in texts.items():
            atomic.write_bytes(self.out / name, text.encode())
        return [
            *(self.out / name for name in texts),
            html_page.write(reproduction_table.page(self.paper, rows), self.out),
        ]


def _build(run: FoundRun) -> str:
    """fedkern's version and commit in a run."""
    versions = run.summary["versions"]
    return " ".join(str(versions[name]) for name in ("fedkern", "commit") if name in versions)


def _finished(run: FoundRun) -> str:
    """The day on which a run was finished, in UTC.

    No file of a run tells a time, so this is the time of the summary's file, which a copy keeps only with ``cp -p`` or
    ``rsync -t``.
    """
    return datetime.fromtimestamp((run.folder / SUMMARY).stat().st_mtime, UTC).date().isoformat()


def _needed(job: Job) -> list[Job]:
    return [job] if job.before is None else [job.before, job]


_OF_DATA = ("data", "data_options", "clients", "partition", "train_samples", "public_samples", "correlation")
"""Settings that decide whether data can be loaded."""


def _without_data(job: Job, reasons: dict[str, str]) -> str:
    """Why a job has no data here, or ""; ``reasons`` keeps the answers for jobs on the same data."""
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
    return ", ".join(f"{name} {word(value)}" for name, value in point.swept.items())


def _reached(cell: PublishedCell, run: FoundRun | None) -> str:
    """The figure of a run for people; where the run misses the target, its best value."""
    if run is None:
        return "failed"
    value = figure_of(cell, run)
    if value is not None:
        return shown(replace(cell, measure="value"), value)
    assert cell.goal is not None
    return f"misses the target with {human_metric(cell.goal.figure, best(cell.goal.figure, run))}"
