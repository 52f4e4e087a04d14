"""A report's file: what it holds, what it forbids, and how it is written."""

import base64
import hashlib
import importlib.util
import tomllib
from pathlib import Path

import pytest
from html_reader import Reader

import fedkern
from fedkern.errors import UserError
from fedkern.report import html_page
from fedkern.report.html_charts import Series, curves
from fedkern.report.html_page import Example, Page, Picture, Section, Table

pytest.importorskip("plotly", reason="needs plotly: pip install 'fedkern[report]'")
pytest.importorskip("jinja2", reason="needs jinja2: pip install 'fedkern[report]'")

EVIL = "</script><script>alert(1)</script><img src=https://example.org/x.png>&amp;"


def made(name="a name"):
    section = Section("one", name, [name], code=[name])
    section.tables.append(Table([name, "value"], [[name, "1"]], name))
    section.charts.append(curves("two", name, [Series(name, [1, 2], [0.5, 0.25])], axis=name))
    section.pictures.append(Picture(name, name, html_page.data_uri(b"\x89PNG")))
    section.examples.append(
        Example(html_page.data_uri(b"\x89PNG"), name, [(name, "right"), (name, "wrong"), (name, "")])
    )
    return Page(name, name, [name, name], [(name, name)], [(name, name)], [section, Section("empty", "left out")])


@pytest.fixture(scope="module")
def evil():
    return html_page.render(made(EVIL))


def test_the_file_is_whole_and_names_nothing_outside(evil):
    page = Reader(evil)
    assert page.unclosed == []
    places = [*page.values("src"), *page.values("href")]
    assert all(place.startswith(("data:", "#")) for place in places)
    assert len(page.scripts) == 2
    assert len([text for text in page.scripts if "Plotly, Inc." in text]) == 1
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
    assert "alert(1)" not in "".join(page.scripts)
    names = [trace.get("name", "") for trace in page.charts["two"]["data"]]
    assert all("<" not in name for name in names)


def test_only_the_scripts_of_the_page_may_run(evil):
    page = Reader(evil)
    (policy,) = [given["content"] for tag, given, _ in page.elements if given.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in page.scripts}
    assert set(rules["script-src"].split()) == hashes
    assert rules["img-src"] == "data: blob:"


def test_every_chart_has_a_sentence_and_a_table(evil):
    page = Reader(evil)
    (label,) = [given["aria-label"] for _, given, _ in page.elements if "data-chart" in given]
    assert "0.5 in round 1, 0.25 in round 2." in label
    assert "2" in page.text("th", scope="row")
    assert page.values("data-chart") == ["two"]


def test_a_report_is_written_over_an_older_one_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(UserError, match="the disk is full"):
            html_page.write(made(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"
    assert html_page.write(made(), tmp_path) == tmp_path / "report.html"
    text = (tmp_path / "report.html").read_bytes()
    assert text.startswith(b"<!doctype html>")
    html_page.write(made(), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_name_that_is_no_unicode_is_written(tmp_path):
    html_page.write(made("\udcff"), tmp_path)
    assert "\\udcff" in (tmp_path / "report.html").read_text()


def test_a_folder_in_the_file_s_place(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="is a folder, where the report is to be written"):
        html_page.write(made(), tmp_path)


@pytest.mark.parametrize("missing", [{"plotly"}, {"jinja2"}, {"plotly", "jinja2"}])
def test_missing_packages(monkeypatch, missing):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else real(name, *a))
    with pytest.raises(UserError, match=r"A report needs .*: pip install 'fedkern\[report\]'\.") as error:
        html_page.check_installed()
    assert all(name in str(error.value) for name in missing)
    assert all(name not in str(error.value) for name in {"plotly", "jinja2"} - missing)


def test_templates_are_part_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["fedkern"]
    root = Path(fedkern.__file__).parent
    packed = {path for pattern in patterns for path in root.glob(pattern)}
    assert {path.name for path in packed if path.parent == root / "report" / "templates"} == {
        "report.css", "report.html.j2", "report.js",
    }  # fmt: skip
