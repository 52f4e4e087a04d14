"""A report's file: its contents, its restrictions, and its writing."""

import re
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import fedkern
from fedkern.errors import UserError
from fedkern.report.figures.curves import Curve, Panel
from fedkern.report.figures.plots import wrap_text
from fedkern.report.names import TITLE, label
from fedkern.report.pages import html_page
from fedkern.report.pages.charts import curves
from fedkern.report.pages.html_page import Code, Page, Picture, Section, make_section
from fedkern.text_table import Table
from python_tests.html_reader import Reader

EVIL = "</script><script>alert(1)</script><img src=https://example.org/x.png>&amp;"


def make(name="a name"):
    blocks = [
        name, Code(name), Table([name, "value"], [[name, "1"]], name),
        curves("two", name, [Panel(name, [Curve(name, [1, 2], [0.5, 0.25])])]),
        Picture(name, name, html_page.data_uri(b"\x89PNG")),
    ]  # fmt: skip
    sections = [Section("one", name, blocks), Section("empty", "left out", [])]
    return Page(name, name, [name, name], [(name, name)], [(name, name)], sections)


@pytest.fixture(scope="module")
def evil():
    return html_page.render(make(EVIL))


def test_the_file_is_whole_and_names_nothing_outside(evil):
    page = Reader(evil)
    assert page.unclosed == []
    places = [*page.values("src"), *page.values("href")]
    assert all(place.startswith(("data:", "#")) for place in places)
    assert "#empty" not in places
    (style,) = page.text("style")
    assert "@import" not in style
    assert "url(" not in style
    assert page.text("html", lang="en")


def test_names_are_texts(evil):
    page = Reader(evil)
    assert page.text("h1") == [EVIL]
    assert EVIL in page.values("alt")
    assert any(EVIL in text for text in page.values("aria-label"))
    assert {*wrap_text(label(EVIL, TITLE), 12, 2.2).split("\n")} <= {*page.text("text")}
    assert page.text("script") == []


def test_control_characters_are_escaped_and_code_keeps_its_lines():
    odd = html_page.render(make("a\x1b[2J\u202eb"))
    assert odd.replace("\n", "").isprintable()
    page = Reader(odd)
    assert page.text("h1") == [r"a\x1b[2J\u202eb"]
    assert r"a\x1b[2J\u202eb" in page.values("alt")
    assert "<code>one\ntwo</code>" in html_page.render(make("one\ntwo"))


def test_the_page_runs_and_loads_nothing(evil):
    page = Reader(evil)
    (policy,) = [given["content"] for tag, given, _ in page.elements if given.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {"default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:"}


def test_every_chart_has_a_sentence_and_a_table(evil):
    page = Reader(evil)
    (label,) = [given["aria-label"] for _, given, _ in page.elements if given.get("role") == "img"]
    assert "0.5 in round 1, 0.25 in round 2." in label
    assert "2" in page.text("th", scope="row")
    assert page.charts == {"two"}
    assert len(page.text("svg")) == 1


def test_a_page_follows_the_ground_of_the_system(evil):
    """A chart names black, greys and blue, and the style sheet defines them for light and dark."""
    (style,) = Reader(evil).text("style")
    light, dark = style.split("@media (prefers-color-scheme: dark)", 1)
    chart = evil[evil.index("<svg") : evil.index("</svg>")]
    ElementTree.fromstring(f"{chart}</svg>")
    named = set(re.findall(r"var\((--\w+)\)", chart)) | {"--text"}
    assert named == {"--text", "--line", "--blue"}
    assert all(f"{name}: #" in light for name in named)
    assert all(f"{name}: #" in dark for name in named)
    assert "svg text { fill: currentColor; }" in style
    assert "stroke: currentColor" in chart
    assert not re.search("#(000000|ffffff|dddddd|0072b2)", chart)


def test_a_report_is_written_over_an_older_one_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(UserError, match="the disk is full"):
            html_page.write_page(make(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"
    assert html_page.write_page(make(), tmp_path) == tmp_path / "report.html"
    text = (tmp_path / "report.html").read_bytes()
    assert text.startswith(b"<!doctype html>")
    html_page.write_page(make(), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_section_says_what_it_lacks():
    def blocks():
        yield "first"
        yield {}["site"]

    assert make_section("one", "One", blocks()).blocks == [
        "first",
        "The rest of this section is missing: KeyError: 'site'.",
    ]


def test_a_name_that_is_no_unicode_is_written(tmp_path):
    html_page.write_page(make("\udcff"), tmp_path)
    assert "\\udcff" in (tmp_path / "report.html").read_text()


def test_a_folder_in_the_file_s_place(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="is a folder, where the report is to be written"):
        html_page.write_page(make(), tmp_path)


def test_templates_are_part_of_the_package():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["fedkern"]
    root = Path(fedkern.__file__).parent
    packed = {path for pattern in patterns for path in root.glob(pattern)}
    assert {path.name for path in packed if path.parent == root / "report" / "pages" / "templates"} == {
        "report.css", "report.html.j2",
    }  # fmt: skip
