"""Names that users and files chose, as pictures, tables and terminals show them: never interpreted, never too long."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from fedkern.errors import printable_name

TITLE, TICK, CELL = 100, 24, 200
"""Characters of a picture's title, of a label within it, and of a table's cell."""


def label(name: object, most: int = TICK) -> str:
    """A name as a text of a picture; :func:`fedkern.report.plots.save` keeps it from being read as a formula."""
    return printable_name(str(name), most)


def plain(name: object, style: str = "", most: int = CELL) -> Text:
    """A name as a cell or title of a table: rich would read ``[red]`` as a colour and ``:dog:`` as an emoji."""
    return Text(printable_name(str(name), most), style=style)


def say(console: Console, text: str) -> None:
    """Prints a line with names in it, whole, as it is."""
    console.print(plain(text, most=sys.maxsize), soft_wrap=True)
