"""The display of a run: on a terminal, in a notebook or in a file."""

from __future__ import annotations

from rich.console import Console

from fedkern.report.live.progress import Lines, Live, Warnings, terminal


def display(*, quiet: bool, json: bool, console: Console | None = None) -> Warnings:
    """Chooses the display, which writes to standard error, so that standard output holds only results.

    Only warnings are shown if ``quiet``, and with ``json`` unless a person watches a terminal.
    """
    console = console or terminal(stderr=True)
    if quiet:
        return Warnings(console)
    if console.is_terminal:
        return Live(console)
    if json:
        return Warnings(console)
    if console.is_jupyter:
        from fedkern.report.live.notebook import Notebook

        return Notebook(console)
    return Lines(console)
