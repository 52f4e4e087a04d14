"""A report's file and its charts: well-formed SVG, contents, restrictions, and writing."""

import math
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import fedkern
from fedkern.errors import UserError
from fedkern.report.figures import plots
from fedkern.report.figures.curves import SOFT, Curve, Panel
from fedkern.report.figures.plots import GREY, spread_evenly, to_svg, wrap_text
from fedkern.report.names import TITLE, label
from fedkern.report.pages import html_page
from fedkern.report.pages.charts import BARS, ROWS, bars, counts_table, curves, dots
from fedkern.report.pages.html_page import Code, Page, Picture, Section, make_section
from fedkern.report.tables import in_unit
from fedkern.text_table import Table
from python_tests.html_reader import Reader

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Return the figures of the charts."""
    found = []
    monkeypatch.setattr(plots, "to_svg", lambda figure, name: found.append(figure) or to_svg(figure, name))
    return found


def texts(chart):
    """Return the texts of a chart's SVG.

    The SVG must be well-formed, and the tables must have the figures.
    """
    for table in chart.tables:
        assert all(len(row) == len(table.header) for row in table.rows)
    return [text.text for text in ElementTree.fromstring(chart.svg).iter(f"{SVG}text")]


def test_curves_have_colours_dashes_and_marks_of_their_own(figures):
    series = [Curve(f"client {k}", [1, 2, 3], [k, k + 0.5, math.nan]) for k in range(9)]
    chart = curves("a", "A", [Panel("loss", [*series, Curve("validation", [1], [2.0], SOFT)])])
    assert {"client 0", "client 8", "validation", "loss", "communication round"} <= {*texts(chart)}
    *lines, validation = figures[0].axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 9
    assert (validation.get_color(), validation.get_linestyle(), validation.get_marker()) == (GREY, "--", "")
    assert chart.text.startswith("client 0: 0 in round 1, 0.5 in round 2; client 1: 1 in round 1")
    assert chart.text.endswith("; and 4 more.")
    assert chart.tables[0].rows[0] == ["1", "0", "1", "2", "3", "4", "5", "6", "7", "8", "2"]
    assert chart.tables[0].rows[2][1] == "–"


def test_a_loss_far_from_zero_fills_its_axis(figures):
    series = [Curve("a", [1, 2], [5.01, 5.0]), Curve("b", [1, 2], [5.02, 5.0])]
    for zero in (False, True):
        curves("a", "A", [Panel("loss", series, zero=zero)])
    free, from_zero = (figure.axes[0].get_ylim() for figure in figures)
    assert 4.9 < free[0] < 5 < free[1] < 5.1
    assert from_zero[0] == 0


def test_the_ticks_of_times_stand_apart(figures):
    bars("a", "A", ["x", "y"], {"time": [201.0, 179.0]}, axis="time", unit="s")
    figures[0].draw_without_rendering()
    boxes = [text.get_window_extent() for text in figures[0].axes[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_an_axis_has_its_whole_title(figures):
    bars("a", "A", ["x"], {"r": [20.0]}, axis="image to text, recall at 1", unit="%")
    assert figures[0].axes[0].get_xlabel() == "image to text, recall at 1 (%)"


def test_a_long_curve_is_small_and_its_table_says_what_it_leaves_out():
    rounds = list(range(1, 10_001))
    values = np.random.default_rng(0).random(10_000) * 1e10
    chart = curves("a", "A", [Panel("sent", [Curve("x", rounds, [*values[:-1], 1e10])], "B")])
    assert "10.0 GB" in texts(chart)
    assert len(chart.tables[0].rows) == ROWS
    assert chart.tables[0].title == "30 of 10000 rounds"
    assert chart.tables[0].rows[-1] == ["10000", "10.0 GB"]
    assert len(chart.svg) < 200_000


def test_bars_of_many_labels_are_the_lowest():
    labels = [f"class {i}" for i in range(100)]
    values = [float(100 - i) for i in range(100)]
    chart = bars("a", "A", labels, {"recall": [None, *values[1:]]}, axis="recall", unit="%")
    named = [text for text in texts(chart) if text.startswith("class")]
    assert named == [f"class {i}" for i in range(99, 99 - BARS, -1)]
    assert chart.note == "The 40 lowest of 100."
    assert chart.text == "lowest 1.0 % (class 99), highest 99.0 % (class 1)."


def test_bars_of_equal_names_stay_apart(figures):
    chart = bars("a", "A", ["same", "same"], {"x": [1, 2], "y": [3, None]}, axis="x")
    assert texts(chart).count("same") == 2
    patches = figures[0].axes[0].patches
    assert [patch.get_width() for patch in patches] == [1, 2, 3, 0]
    assert len({patch.get_y() for patch in patches}) == 4
    assert len({patch.get_facecolor() for patch in patches}) == 2
    assert chart.tables[0].rows == [["same", "1", "3"], ["same", "2", "–"]]


def test_counts_by_row_and_column():
    table = counts_table(np.array([[3, 1], [0, 0]]), ["x", "y"], ["<b>", "d"], row="client", column="class")
    assert table.header == ["client \\ class", "<b>", "d"]
    assert table.rows == [["x", "3", "1"], ["y", "0", "0"]]
    names = [str(i) for i in range(500)]
    large = counts_table(np.ones((500, 100), dtype=int), names, names[:100], row="r", column="c")
    assert len(large.rows) == 30
    assert len(large.header) == 21
    assert large.title == "number of samples; 30 of 500 rows; 20 of 100 columns"


def test_dots_of_runs_and_their_mean(figures):
    chart = dots("a", "A", [("one", [10, 20], 15, 7.07), ("two", [30], 30, None)], axis="accuracy", unit="%")
    assert {"one", "two", "accuracy (%)"} <= {*texts(chart)}
    runs = figures[0].axes[0].get_lines()[0]
    assert (runs.get_xdata().tolist(), runs.get_ydata().tolist()) == ([10, 20], [0, 0])
    ends = [(line[0][0], line[-1][0]) for line in figures[0].axes[0].collections[0].get_segments()]
    assert ends == [pytest.approx((7.93, 22.07))]
    assert len(figures[0].axes[0].collections) == 1  # a single run has no deviation
    assert chart.tables[0].rows[1] == ["two", "30.0 %", "30.0 %", "–"]


def image(name):
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.eye(3))
    axes.plot([0, 1], [0, 1], "o-", label='id="x" #000000 $a_{$ <b> 肺')
    axes.legend()
    return to_svg(figure, name)


def test_equal_figures_give_equal_texts_and_others_share_no_id():
    assert image("a") == image("a")
    trees = [ElementTree.fromstring(image(name)) for name in "ab"]
    ids = [[element.attrib["id"] for element in tree.iter() if "id" in element.attrib] for tree in trees]
    assert len(ids[0]) == len(set(ids[0]))
    assert not set(ids[0]) & set(ids[1])
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', image("a"))
    assert used
    assert {own_id or link_id for own_id, link_id in used} <= set(ids[0])


def test_texts_of_a_figure_stay_as_they_are():
    tree = ElementTree.fromstring(image("a"))
    assert 'id="x" #000000 $a_{$ <b> 肺' in [text.text for text in tree.iter(f"{SVG}text")]
    assert not list(tree.iter(f"{SVG}style"))  # it would be a style of the whole page
    assert not list(tree.iter(f"{SVG}metadata"))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(None, "%", "–"), (math.inf, "", "–"), (12.34, "%", "12.3 %"), (44695848, "B", "44.7 MB"), (0.4213, "s", "0.42 s"),
     (1234.0, "images", "1,234"), (0.12345, "", "0.123")],
)  # fmt: skip
def test_values_as_texts(value, unit, text):
    assert in_unit(value, unit) == text


def test_evenly_spread_positions():
    assert spread_evenly(3, 10) == [0, 1, 2]
    assert spread_evenly(100, 4) == [0, 33, 66, 99]


# -- html page ---------------------------------------------------------------------------------------------------------


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


def test_the_file_is_whole_and_runs_loads_and_names_nothing_outside(evil):
    page = Reader(evil)
    assert page.unclosed == []
    places = [*page.values("src"), *page.values("href")]
    assert all(place.startswith(("data:", "#")) for place in places)
    assert "#empty" not in places
    (style,) = page.text("style")
    assert "@import" not in style
    assert "url(" not in style
    assert page.text("html", lang="en")
    (policy,) = [given["content"] for tag, given, _ in page.elements if given.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {"default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:"}


def test_names_are_texts_and_every_chart_has_a_sentence_and_a_table(evil):
    page = Reader(evil)
    assert page.text("h1") == [EVIL]
    assert EVIL in page.values("alt")
    assert {*wrap_text(label(EVIL, TITLE), 12, 2.2).split("\n")} <= {*page.text("text")}
    assert page.text("script") == []
    (sentence,) = [given["aria-label"] for _, given, _ in page.elements if given.get("role") == "img"]
    assert EVIL in sentence
    assert "0.5 in round 1, 0.25 in round 2." in sentence
    assert "2" in page.text("th", scope="row")
    assert page.charts == {"two"}
    assert len(page.text("svg")) == 1


def test_control_characters_are_escaped_and_code_keeps_its_lines():
    odd = html_page.render(make("a\x1b[2J\u202eb"))
    assert odd.replace("\n", "").isprintable()
    page = Reader(odd)
    assert page.text("h1") == [r"a\x1b[2J\u202eb"]
    assert r"a\x1b[2J\u202eb" in page.values("alt")
    assert "<code>one\ntwo</code>" in html_page.render(make("one\ntwo"))


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
