"""Names from users and files, for pictures, tables and terminals: shortened, and never read as markup."""

import sys

from rich.console import Console
from rich.text import Text

from fedkern.errors import printable_name

TITLE, TICK, CELL = 100, 24, 200
"""Longest title of a picture, label in a picture, and table cell, in characters."""


def label(name: object, limit: int = TICK) -> str:
    """Return a name for a picture, in which :func:`fedkern.report.figures.plots.save_png` parses no formula."""
    return printable_name(str(name), limit)


def capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def entry(name: object, limit: int = TICK) -> str:
    """Return :func:`label` for a legend, from which matplotlib drops texts that begin with "_"."""
    text = label(name, limit)
    return f"\N{NO-BREAK SPACE}{text}" if text.startswith("_") else text


def literal_text(name: object, style: str = "", limit: int = CELL) -> Text:
    """Return a name as literal text: in a plain string rich reads ``[red]`` as a colour, ``:dog:`` as an emoji."""
    return Text(printable_name(str(name), limit), style=style)


def print_line(console: Console, text: str) -> None:
    console.print(literal_text(text, limit=sys.maxsize), soft_wrap=True)
