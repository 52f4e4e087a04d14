"""A table of texts for a terminal, a notebook, a page, Markdown and LaTeX."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from fedkern.errors import MESSAGE, printable_name

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

CELL, LINE = 200, 2000
"""Longest cell, and longest line above or below the table in a notebook, in characters."""
NO_BREAK = "\u00a0"
"""The space between a number and its unit."""


@dataclass(frozen=True)
class Table:
    """A table of texts. The first ``words`` columns hold words, the others right-aligned numbers.

    Attributes:
        rows: the texts, of which a ``Text`` has its own style on a terminal.
        title: may have several lines, so names in it must be ``printable_name``.
        notes: lines below the table.
        breaks: rows before which a terminal leaves a line free.
        bold: whether the numbers stand out on a terminal.
        bare: whether a terminal leaves the header out.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    title: str = ""
    words: int = 1
    notes: Sequence[str] = ()
    breaks: Sequence[int] = ()
    bold: bool = False
    bare: bool = False

    def __rich__(self) -> Group:
        from rich import box
        from rich.console import Group
        from rich.table import Table as TerminalTable
        from rich.text import Text

        def plain(text: str, limit: int = CELL, style: str = "") -> Text:
            return Text(printable_name(text, limit), style=style)

        table = TerminalTable(box=box.SIMPLE_HEAD, pad_edge=False, show_header=not self.bare)
        for number, name in enumerate(self.header):
            words = number < self.words
            style = "bold" if self.bold and not words else ""
            table.add_column(plain(name), justify="left" if words else "right", style=style, overflow="fold")
        for number, row in enumerate(self.rows):
            if number in self.breaks:
                table.add_section()
            table.add_row(*(cell if isinstance(cell, Text) else plain(cell) for cell in row))
        # The title is no part of the table, which would break it at the width of the columns.
        titles = [plain(line, MESSAGE, "table.title") for line in self.title.split("\n") if line]
        return Group(*titles, table, *(plain(note, MESSAGE) for note in self.notes))

    def html(self) -> str:
        def text(name: str, limit: int = LINE) -> str:
            return escape(printable_name(name, limit))

        def row(tag: str, cells: Sequence[str | Text]) -> str:
            texts = [text(str(cell), CELL) for cell in cells]
            if tag == "td":
                texts[self.words :] = [number.replace(" ", NO_BREAK) for number in texts[self.words :]]
            sides = ["left" if number < self.words else "right" for number in range(len(texts))]
            return "".join(
                f'<{tag} style="text-align: {side}">{cell}</{tag}>' for side, cell in zip(sides, texts, strict=True)
            )

        first_line, *more_lines = self.title.split("\n")
        above = "<br>".join([f"<strong>{text(first_line)}</strong>", *map(text, more_lines)])
        body = "\n".join(f"<tr>{row('td', cells)}</tr>" for cells in self.rows)
        table = f"<table>\n<thead><tr>{row('th', self.header)}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        parts = [
            f"<p>{above}</p>" if self.title else "",
            f'<div style="overflow-x: auto">\n{table}\n</div>' if self.header else "",
            f"<p>{'<br>'.join(map(text, self.notes))}</p>" if self.notes else "",
        ]
        return "\n".join(["<div>", *filter(None, parts), "</div>"])

    def markdown(self) -> str:
        lines = ["| " + " | ".join(_markdown(str(cell)) for cell in row) + " |" for row in (self.header, *self.rows)]
        lines.insert(1, "|---|" + "---:|" * (len(self.header) - 1))
        notes = (f"{_markdown(note)}\n" for note in self.notes)
        return "\n".join([f"# {_markdown(self.title)}", "", *lines, "", *notes])

    @classmethod
    def of_markdown(cls, text: str) -> Table | None:
        """Read header, rows and notes of a :meth:`markdown`, None if the text has another form."""
        lines = text.splitlines()
        body = [line for line in lines if line.startswith("| ")]
        rows = [[_of_markdown(cell) for cell in line[2:-2].split(" | ")] for line in body]
        if len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
            return None
        after = lines[lines.index(body[-1]) + 1 :]
        return cls(rows[0], rows[1:], notes=[_of_markdown(line) for line in after if line.strip()])

    def latex(self) -> str:
        lines = [f"% {_line(text)}" for text in (self.title, *self.notes)]
        lines += [f"\\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}", "\\toprule", _latex(self.header)]
        lines += ["\\midrule", *map(_latex, self.rows), "\\bottomrule", "\\end{tabular}"]
        return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    """Return a text as one line without control characters, of any length."""
    return printable_name(" ".join(text.split()), sys.maxsize)


_ACTIVE = re.compile(r"[|*_`<>\\~$]|\](?=[(:\[])|:(?=//)|(?<=www)\.|&(?=#?\w+;)", re.IGNORECASE)
"""Characters that make a text in Markdown a link, code, a formula or an entity."""


def _markdown(text: str) -> str:
    return _ACTIVE.sub(r"\\\g<0>", _line(text))


def _of_markdown(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


_TEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--",
    "<": r"$<$", ">": r"$>$", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def _latex(cells: Sequence[str | Text]) -> str:
    return " & ".join("".join(_TEX.get(c, c) for c in _line(str(cell))) for cell in cells) + r" \\"
