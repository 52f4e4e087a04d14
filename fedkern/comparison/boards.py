"""Progress of a comparison: a line for every run, and on a terminal the current run."""

import time
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.status import Status

from fedkern.comparison.cells import Cell
from fedkern.comparison.found_runs import FoundRun
from fedkern.listeners.events import Listener, Record, RunInfo
from fedkern.report.live.progress_bar import main_figures, make_console
from fedkern.report.names import literal_text, print_line
from fedkern.report.tables import human_time


class Board(Listener):
    """Display of a comparison and listener of the current cell. Without a console it shows nothing.

    The line of a finished cell predicts the time left from this process's cells.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=True)
        self.planned: Sequence[Cell] = ()
        self.start = time.monotonic()
        self.began: dict[str, float] = {}
        self.done = self.played = 0
        self.tests: Collection[str] = ()
        self.main = self.playing = ""
        self.status = Status("", console=console) if console and console.is_terminal else None

    def on_start(self, run: RunInfo) -> None:
        self.tests, self.main = run.test_sets, run.config.main

    def on_cells(self, planned: Sequence[Cell]) -> None:
        """Announce the next cells, some of which may be finished."""
        self.planned, self.done = planned, 0

    def focus(self, cell: Cell) -> None:
        self.playing = f"{cell.variant.label}, seed {cell.seed}"

    def on_cell(self, cell: Cell) -> None:
        self.began[cell.name] = time.monotonic()
        self.focus(cell)
        self._show("starts")

    def on_round(self, record: Record) -> None:
        self._show(f"{record['round']}/{record['rounds']}  {main_figures(record, self.main, self.tests)}")

    def _show(self, text: str) -> None:
        if self.status is not None:
            self.status.update(literal_text(f"{self.playing}  {text}"))
            self.status.start()

    def on_cell_end(self, cell: Cell, run: FoundRun, *, again: bool) -> None:
        """Announce a finished cell. ``again`` means that it was finished before."""
        self.done += 1
        self.played += not again
        took = "finished before" if again else human_time(time.monotonic() - self.began[cell.name])
        figures = main_figures(run.metrics, run.main, self.tests) or "no figures told"
        remaining = len(self.planned) - self.done
        left = (time.monotonic() - self.start) / max(self.played, 1) * remaining
        self._line(cell, f"{figures}  {took}" + f", about {human_time(left)} left" * bool(remaining and not again))

    def on_cell_failed(self, cell: Cell, message: str) -> None:
        self.done += 1
        self.played += 1
        self._line(cell, f"failed: {' '.join(message.split())}")

    def _line(self, cell: Cell, text: str) -> None:
        print_line(self.console, f"{self.done}/{len(self.planned)}  {cell.variant.label}, seed {cell.seed}  {text}")

    def close(self) -> None:
        """Restore the terminal. Safe to call twice."""
        if self.status is not None:
            self.status.stop()


def choose_board(*, quiet: bool, json: bool) -> Board:
    """Choose the display on standard error: none if ``quiet``, with ``json`` only on a terminal."""
    console = make_console(stderr=True)
    return Board(None if quiet or (json and not console.is_terminal) else console)
