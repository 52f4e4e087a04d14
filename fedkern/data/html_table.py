"""A table as HTML, for results that a notebook shows (``_repr_html_``)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fedkern.errors import printable_name

CELL, LINE = 200, 2000
"""Most characters of a cell, and of a line above or below the table."""
NO_BREAK = "\u00a0"
"""A space at which a number is not parted from its unit."""


def html_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = (), *, words: int = 1
) -> str:
    """A title, a table and lines below the table, in the notebook's own colours.

    The first line of the title stands out; without a header there is no table.  The first ``words`` columns hold words.
    The others hold numbers and are set to the right.
    """

    def text(name: str, most: int = LINE) -> str:
        return escape(printable_name(name, most))

    def cell(tag: str, number: int, content: str) -> str:
        side, filled = "left" if number < words else "right", text(content, CELL)
        if tag == "td" and side == "right":
            filled = filled.replace(" ", NO_BREAK)
        return f'<{tag} style="text-align: {side}">{filled}</{tag}>'

    def row(tag: str, cells: Sequence[str]) -> str:
        return "".join(cell(tag, number, content) for number, content in enumerate(cells))

    first, *more = title.split("\n")
    above = "<br>".join([f"<strong>{text(first)}</strong>", *map(text, more)])
    body = "\n".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    table = f"<table>\n<thead><tr>{row('th', header)}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    parts = [
        f"<p>{above}</p>" if title else "",
        f'<div style="overflow-x: auto">\n{table}\n</div>' if header else "",
        f"<p>{'<br>'.join(map(text, notes))}</p>" if notes else "",
    ]
    return "\n".join(["<div>", *filter(None, parts), "</div>"])
