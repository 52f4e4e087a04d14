"""Runs in a notebook: a display with a table of the rounds, results as HTML, and pictures below a cell."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import printable_name
from fedkern.listeners.events import Record, RunInfo, Summary
from fedkern.report.live import progress_bar
from fedkern.report.tables import final_table, human_bytes, human_time, worst_client_line
from fedkern.text_table import LINE, Table

ROUNDS = 30
PAUSE = 0.2
"""Least seconds between two moves of the bar, because the whole table travels to the browser."""


def run_table(summary: Summary, out: Path, main: str) -> str:
    warnings = [f"warning ({name}): {text}" for name, text in (summary.get("diagnostics") or {}).items()]
    notes = [*filter(None, [worst_client_line(summary)]), *warnings, f"run folder {out}"]
    return replace(final_table(summary, main), notes=notes).html()


def rounds_table(
    records: Sequence[Record], title: str, main: str, notes: Sequence[str] = (), tests: Collection[str] = ()
) -> str:
    """Return the rounds with their ``main`` figure as HTML, of many rounds evenly spaced ones and the last."""
    complete = len(records) <= ROUNDS
    candidates = [
        record for record in records if complete or any(name.endswith(main) for name in record) or record is records[-1]
    ]
    step = -(-len(candidates) // ROUNDS) or 1
    some_records = candidates[(len(candidates) - 1) % step :: step]
    selection = [(record, progress_bar.figures_by_set(record, main, tests)) for record in some_records]
    titles = list(dict.fromkeys(title for _, figures in selection for title in figures))
    losses = ["loss"] if any("loss" in record for record, _ in selection) else []
    rows = []
    for record, figures in selection:
        cells = [figures.get(title, "") for title in titles]
        cells += [f"{record[name]:.3f}" if isinstance(record.get(name), (int, float)) else "" for name in losses]
        cells += [human_bytes(record["bytes_up"]), human_bytes(record["bytes_down"]), human_time(record["seconds"])]
        rows.append([str(record["round"]), *cells])
    header = ["round", *titles, *losses, "up", "down", "time"] if rows else []
    notes = notes if complete else [f"{len(selection)} of {len(records)} rounds", *notes]
    return Table(header, rows, title, notes=notes).html()


class Notebook(progress_bar.Lines):
    """Display of a run below a cell: a permanent table of the rounds, and a bar that moves with every client."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._output: Any = None
        self.title = self.table = self.doing = self.left = ""
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.done, self.moved, self.participants = 0, 0.0, 1
        self.shown = time.monotonic()

    def on_notice(self, text: str) -> None:
        self._show(text)

    def on_start(self, run: RunInfo) -> None:
        self.clock = progress_bar.Clock(progress_bar.training_words(run))
        self.tests, self.main = run.test_sets, run.config.main
        self.title = "\n".join(progress_bar.run_headline(run))
        self.notes += [progress_bar.UNSHOWN] if run.private else []
        self.done, self.moved = run.first_round, float(run.first_round)
        self.records = read_metrics(run.out)[: self.done] if self.done else []
        self._tabulate(f"round {self.done}/{len(run.rounds)}")

    def on_round_start(self, round: int, name: str, participants: Sequence[int]) -> None:
        super().on_round_start(round, name, participants)
        self.participants = max(len(participants), 1)
        if round > 0:
            trains = self.clock.words[round - 1]
            self._show(f"round {round}/{len(self.clock.words)}{f' ({trains})' if trains else ''}{self.left}")

    def on_client(self, round: int, client: int, info: Mapping[str, object]) -> None:
        if round > 0:
            # A round with several exchanges must not move the bar past the end of the round.
            self.moved = min(self.moved + 1 / self.participants, self.done + 1)
            if time.monotonic() - self.shown >= PAUSE:
                self._show(self.doing)

    def on_round(self, record: Record) -> None:
        self.records.append({name: value for name, value in record.items() if name != "clients"})
        self.done, self.moved = record["round"], float(record["round"])
        remaining = self.clock.remaining(self.done)
        self.left = "" if remaining is None else f", {human_time(remaining)} left"
        self._tabulate(self.doing)

    def on_warning(self, name: str, text: str) -> None:
        self.notes.append(f"warning ({name}): {text}")
        self._tabulate(self.doing)

    def on_end(self, summary: Summary) -> None:
        if self.doing:  # otherwise the run was finished before
            self._show("")

    def close(self) -> None:
        if self.doing:
            self.notes.append(f"stopped after round {self.done} of {len(self.clock.words)}")
            self._tabulate("")

    def _tabulate(self, doing: str) -> None:
        self.table = rounds_table(self.records, self.title, self.main, self.notes, self.tests)
        self._show(doing)

    def _show(self, doing: str) -> None:
        from IPython.display import HTML, display

        self.doing, self.shown = doing, time.monotonic()
        rounds = len(self.clock.words)
        bar = f'<progress max="{rounds}" value="{self.moved:.2f}"></progress> ' if rounds else ""
        line = f"<p>{bar}{escape(printable_name(doing, LINE))}</p>" if doing else ""
        if self._output is None:
            self._output = display(HTML(self.table + line), display_id=True)
        else:
            self._output.update(HTML(self.table + line))


class Pictures(list[Path]):
    """Paths of pictures, which a notebook shows below a cell that returns them."""

    def _ipython_display_(self) -> None:
        from IPython.display import Image, display

        for path in self:
            if path.exists():
                display(Image(filename=str(path), alt=path.stem, retina=True))
            else:
                print(f"{path} is missing: draw the pictures again.")


def choose_display(*, quiet: bool, json: bool, console: Console | None = None) -> progress_bar.Warnings:
    """Choose the display, on standard error, so that standard output holds only results.

    Only warnings are shown if ``quiet``, and with ``json`` except on a terminal.
    """
    console = console or progress_bar.make_console(stderr=True)
    if quiet or (json and not console.is_terminal):
        return progress_bar.Warnings(console)
    if console.is_terminal:
        return progress_bar.Live(console)
    return Notebook(console) if console.is_jupyter else progress_bar.Lines(console)
