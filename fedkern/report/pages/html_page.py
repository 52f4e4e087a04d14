"""A report as one HTML file: its parts as plain data, and the rendering.

The file holds its charts as SVG, its pictures as data URIs, and one style sheet. The content security policy allows
nothing else, so that the file loads nothing and runs no code from a name or a caption.
"""

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
    """A chart as an SVG element, with a text and tables for readers who cannot see it, and a sentence below it.

    The name is unique on the page: lower-case letters, digits, hyphens.
    """

    name: str
    title: str
    text: str
    svg: str
    tables: Sequence[Table]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    title: str
    alt: str
    source: str


@dataclass(frozen=True)
class Code:
    """A command in a monospaced font."""

    text: str


Block = str | Code | Table | Chart | Picture
"""A part of a section. A text is a paragraph."""


@dataclass(frozen=True)
class Section:
    """A section of a page, left out without blocks. The name is unique on the page."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report.

    The headline has a sceptic's conclusions, first the result. Warnings have a name and a text, tiles the name and the
    value of a main figure.
    """

    title: str
    about: str
    headline: Sequence[str]
    warnings: Sequence[tuple[str, str]]
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def make_section(name: str, title: str, blocks: Iterable[Block]) -> Section:
    """Return a section of these blocks. If making a block fails, a sentence replaces the rest."""
    content: list[Block] = []
    with warn_instead(lambda why: content.append(f"The rest of this section is missing: {why}.")):
        content.extend(blocks)
    return Section(name, title, content)


def versions_table(builds: Iterable[Mapping[str, object]]) -> Table:
    packages: dict[str, dict[str, None]] = {}
    for build in builds:
        for name, version in build.items():
            packages.setdefault(name, {})[str(version)] = None
    rows = [[name, ", ".join(package_versions)] for name, package_versions in packages.items()]
    return Table(["package", "version"], [*rows, ["this report", f"fedkern {versions()['fedkern']}"]], "Versions", 2)


def check_target(folder: Path) -> None:
    path = folder / REPORT
    if path.is_dir():
        raise UserError(f"{path} is a folder, where the report is to be written: move it away.")


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def render(page: Page) -> str:
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
    """Remove control characters from a text, which may hold user names, but leave HTML as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(printable_name(line, sys.maxsize) for line in value.split("\n"))


def write_page(page: Page, folder: Path) -> Path:
    check_target(folder)
    path = folder / REPORT
    atomic.write_bytes(path, render(page).encode(errors="backslashreplace"))
    return path
