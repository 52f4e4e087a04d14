"""Progress of a comparison: a live table on a terminal and in a notebook, a line for every run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedkern.comparison.cell_runner import Board
from fedkern.comparison.cells import Cell
from fedkern.comparison.found_runs import FoundRun
from fedkern.errors import MESSAGE
from fedkern.listeners.events import RunInfo
from fedkern.report.live.notebook import Output
from fedkern.report.live.progress import main_figures, terminal
from fedkern.report.names import plain, say
from fedkern.report.tables import human_time
from fedkern.text_table import Table

SHOWN_SEEDS = 8
"""Most seeds with a column of their own in the live table."""


class LineBoard(Board):
    """A line for every finished cell, with the time left as this process's cells predict."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.planned: Sequence[Cell] = ()
        self.start = time.monotonic()
        self.began: dict[str, float] = {}
        self.done = self.played = 0
        self.tests: Collection[str] = ()
        self.main = ""

    def on_start(self, run: RunInfo) -> None:
        self.tests, self.main = run.test_sets, run.config.main

    def on_cells(self, planned: Sequence[Cell]) -> None:
        self.planned, self.done = planned, 0

    def on_cell(self, cell: Cell) -> None:
        self.began[cell.name] = time.monotonic()

    def on_cell_end(self, cell: Cell, run: FoundRun, *, again: bool) -> None:
        self._count(again)
        took = "finished before" if again else human_time(time.monotonic() - self.began[cell.name])
        figures = main_figures(run.metrics, run.config.main, self.tests) or "no figures told"
        self._line(cell, f"{figures}  {took}{self._left(again)}")

    def on_cell_failed(self, cell: Cell, message: str) -> None:
        self._count(False)
        self._line(cell, f"failed: {' '.join(message.split())}")

    def _count(self, again: bool) -> None:
        self.done += 1
        self.played += not again

    def _left(self, again: bool) -> str:
        remaining = len(self.planned) - self.done
        if again or not remaining:
            return ""
        return f", about {human_time((time.monotonic() - self.start) / self.played * remaining)} left"

    def _line(self, cell: Cell, text: str) -> None:
        say(self.console, f"{self.done}/{len(self.planned)}  {cell.variant.label}, seed {cell.seed}  {text}")


class LiveBoard(LineBoard):
    """A table of variants and seeds whose cells fill up, and show their rounds meanwhile."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.texts: dict[tuple[str, int], Text] = {}
        self.running: Cell | None = None
        self.live = Output() if console.is_jupyter else Live(console=console, transient=True, refresh_per_second=4)
        self.left = ""

    def on_cells(self, planned: Sequence[Cell]) -> None:
        super().on_cells(planned)
        self.live.start()
        self._show()

    def focus(self, cell: Cell) -> None:
        self.running = cell

    def on_cell(self, cell: Cell) -> None:
        super().on_cell(cell)
        self.running = cell
        self._tell("starts", "cyan")

    def on_round(self, record: Mapping[str, Any]) -> None:
        figures = main_figures(record, self.main, self.tests)
        self._tell(f"{record['round']}/{record['rounds']}  {figures}".rstrip(), "cyan")

    def on_cell_failed(self, cell: Cell, message: str) -> None:
        super().on_cell_failed(cell, message)
        self.running = cell
        self._tell("failed", "red")

    def _tell(self, text: str, style: str) -> None:
        if self.running is not None:
            self.texts[self.running.variant.label, self.running.seed] = plain(text, style)
        self._show()

    def on_cell_end(self, cell: Cell, run: FoundRun, *, again: bool) -> None:
        self._count(again)
        self.left = self._left(again) or ("" if self.done >= len(self.planned) else self.left)
        self.running = cell
        self._tell(main_figures(run.metrics, run.config.main, self.tests) or "done", "bold")

    def _line(self, cell: Cell, text: str) -> None:
        if text.startswith("failed"):  # printed above the table, where it stays
            self.console.print(plain(f"{cell.variant.label}, seed {cell.seed}  {text}", most=MESSAGE), soft_wrap=True)

    def _show(self) -> None:
        self.live.update(self.table())

    def table(self) -> Table:
        """The table as it is now."""
        seeds = list(dict.fromkeys(cell.seed for cell in self.planned))
        columns = seeds if len(seeds) <= SHOWN_SEEDS else []
        title = f"{self.done} of {len(self.planned)} runs finished{self.left}"
        header = ["", *(f"seed {seed}" for seed in columns)] if columns else ["", "finished"]
        rows: list[list[str | Text]] = []
        for label in dict.fromkeys(cell.variant.label for cell in self.planned):
            texts = [self.texts.get((label, seed), Text("")) for seed in seeds]
            rows.append([label, *(texts if columns else [f"{sum(t.style == 'bold' for t in texts)} of {len(seeds)}"])])
        return Table(header, rows, title)

    def close(self) -> None:
        self.live.stop()


def board(*, quiet: bool, json: bool) -> Board:
    """Chooses the display, which writes to standard error: none if ``quiet``, for ``json`` one on a terminal alone."""
    console = terminal(stderr=True)
    if quiet or (json and not console.is_terminal):
        return Board()
    return LiveBoard(console) if console.is_terminal or console.is_jupyter else LineBoard(console)
