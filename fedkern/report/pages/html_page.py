"""A report as one HTML file: its parts as plain data, and the file made of them.

The file holds everything it shows: charts as SVG, pictures as data URIs, and one style sheet.  Its content security
policy allows nothing else, so that the file loads nothing and runs no code that a name or a caption brings.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedkern.engine.store.extending import REPORT
from fedkern.errors import UserError, printable_name, warn_instead
from fedkern.files import atomic
from fedkern.process.versions import versions
from fedkern.text_table import Table

_TEMPLATES = Path(__file__).parent / "templates"


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
class Code:
    """A command in full, in a type of equal widths."""

    text: str


Block = str | Code | Table | Chart | Picture
"""A part of a section; a text is a paragraph."""


@dataclass(frozen=True)
class Section:
    """A section of a page.

    One without any block is left out.  Its name is unique on the page.
    """

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report.

    The headline is what a sceptic concludes, sentence by sentence; the first one is the result.  Warnings have a name
    and a text, tiles the name and the value of a main figure.
    """

    title: str
    about: str
    headline: Sequence[str]
    warnings: Sequence[tuple[str, str]]
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def make_section(name: str, title: str, blocks: Iterable[Block]) -> Section:
    """Return a section of these blocks.

    Where making one fails, a sentence stands in its place and ends the section.
    """
    content: list[Block] = []
    with warn_instead(lambda why: content.append(f"The rest of this section is missing: {why}.")):
        content.extend(blocks)
    return Section(name, title, content)


def versions_table(builds: Iterable[Mapping[str, object]]) -> Table:
    """Versions that runs were made with, a mapping for each run, and the version that writes the report."""
    packages: dict[str, dict[str, None]] = {}
    for build in builds:
        for name, version in build.items():
            packages.setdefault(name, {})[str(version)] = None
    rows = [[name, ", ".join(package_versions)] for name, package_versions in packages.items()]
    return Table(["package", "version"], [*rows, ["this report", f"fedkern {versions()['fedkern']}"]], "Versions", 2)


def check_target(folder: Path) -> None:
    """Raise UserError where the report cannot replace what stands at its place in ``folder``."""
    path = folder / REPORT
    if path.is_dir():
        raise UserError(f"{path} is a folder, where the report is to be written: move it away.")


def data_uri(content: bytes) -> str:
    """Return a PNG file's content as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def render(page: Page) -> str:
    """Return the HTML text of a page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # charts without a page need none

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_text,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(
        page=page,
        sections=[part for part in page.sections if part.blocks],
        style=(_TEMPLATES / "report.css").read_text("utf-8").strip(),
    )


def _text(value: object) -> object:
    """Return a value as the template shows it: a text, which may hold names of users, without control characters.

    HTML as it is.
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(printable_name(line, sys.maxsize) for line in value.split("\n"))


def write_page(page: Page, folder: Path) -> Path:
    """Write a page into ``folder``, completely or not at all, over an older report, and return its path.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    check_target(folder)
    text = render(page)
    path = folder / REPORT
    atomic.write_bytes(path, text.encode(errors="backslashreplace"))
    return path
