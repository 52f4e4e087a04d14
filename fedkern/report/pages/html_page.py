"""A report as one HTML file: its parts as plain data, and the file made of them.

The file holds everything it shows: charts as SVG, pictures as data URIs, and one style sheet.  Its content security
policy allows nothing else, so that the file loads nothing and runs no code that a name or a caption brings.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedkern.engine.store.extending import REPORT
from fedkern.errors import UserError
from fedkern.files import atomic

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Table:
    """A table of texts, with the columns' titles and as many cells in every row; the caption may be empty.

    The first ``words`` columns hold words.  The others hold numbers and are set to the right.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: int = 1


@dataclass(frozen=True)
class Chart:
    """A chart, with a text and tables for readers who cannot see it, and a sentence below it.

    Its name is unique on the page: lower-case letters, digits, hyphens.  ``svg`` is the chart as an SVG element.
    """

    name: str
    title: str
    text: str
    svg: str
    tables: Sequence[Table]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with its title and, for readers who cannot see it, a sentence."""

    title: str
    alt: str
    source: str


@dataclass(frozen=True)
class Example:
    """A small picture (a data URI) with lines of text, such as an image and the captions found for it.

    Every line has a mark: ``"right"``, ``"wrong"`` or ``""``.
    """

    source: str
    alt: str
    lines: Sequence[tuple[str, str]]


@dataclass
class Section:
    """A section of a page; one without any content is left out.  Tables stand below the charts, or first."""

    name: str
    title: str
    texts: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    tables_first: bool = False
    pictures: list[Picture] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    code: list[str] = field(default_factory=list)

    @property
    def filled(self) -> bool:
        """Whether the section holds anything."""
        return bool(self.texts or self.charts or self.tables or self.pictures or self.examples or self.code)


@dataclass
class Page:
    """A report.

    The headline is what a sceptic concludes, sentence by sentence; the first one is the result.  Warnings have a name
    and a text, tiles the name and the value of a main figure.
    """

    title: str
    about: str
    headline: list[str]
    warnings: list[tuple[str, str]] = field(default_factory=list)
    tiles: list[tuple[str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def check_target(folder: Path) -> None:
    """Raises UserError where the report cannot replace what stands at its place in ``folder``."""
    path = folder / REPORT
    if path.is_dir():
        raise UserError(f"{path} is a folder, where the report is to be written: move it away.")


def data_uri(content: bytes) -> str:
    """A PNG file's content as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def render(page: Page) -> str:
    """The HTML text of a page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # charts without a page need none

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(
        page=page,
        sections=[section for section in page.sections if section.filled],
        style=(_TEMPLATES / "report.css").read_text("utf-8").strip(),
    )


def write(page: Page, folder: Path) -> Path:
    """Writes a page into ``folder``, completely or not at all, over an older report, and returns its path.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    check_target(folder)
    text = render(page)
    path = folder / REPORT
    atomic.write_bytes(path, text.encode(errors="backslashreplace"))
    return path
