"""Tests of a table of texts on a terminal, in Markdown and in LaTeX."""

import dataclasses
import io
import re

from markdown_it import MarkdownIt
from rich.console import Console
from rich.text import Text

from fedkern.text_table import Table
from python_tests.html_reader import Reader

LINKS = "[x](http://y.z) ![](p.png) <img src=q> [r]: http://y.z $a$ www.y.z <https://y.z> &lt;"
ODD = "a|b *c* _d_ <e> `f` \\g ± 50 % – {h}"
TABLE = Table(["", ODD], [[ODD, "1"], ["last", Text("2", "red")]], "Title", notes=["A note.", ODD], breaks=[1])


def render(table: Table, *, color: bool = False) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=color)
    console.print(table)
    return console.file.getvalue()


def test_markdown_is_read_back():
    table = Table.of_markdown(TABLE.markdown())
    assert table == Table(["", ODD], [[ODD, "1"], ["last", "2"]], notes=["A note.", ODD])
    linked = Table(["", LINKS], [[LINKS, LINKS]], LINKS, notes=[LINKS])
    assert Table.of_markdown(linked.markdown()) == dataclasses.replace(linked, title="")
    tokens = [token for block in MarkdownIt("gfm-like", {"linkify": False}).parse(linked.markdown())
              for token in block.children or []]  # fmt: skip
    assert {token.type for token in tokens} <= {"text", "text_special"}
    assert not re.search("http:| &lt;", linked.markdown())
    assert Table.of_markdown("# Title\n\n| a |\n") is None
    assert Table.of_markdown("| a | b |\n|---|---:|\n| 1 |\n") is None


def test_no_form_holds_control_characters():
    name = "a\x1b[2J\n\u202eb"
    table = Table(["", name], [[name, name]], name, notes=[name])
    for text in (table.markdown(), table.latex(), table.html(), render(table)):
        assert text.replace("\n", "").isprintable()
        assert text.count("x1b") >= 4


def test_latex_has_every_cell_and_says_the_notes_in_comments():
    lines = TABLE.latex().splitlines()
    assert lines[:4] == ["% Title", "% A note.", f"% {ODD}", r"\begin{tabular}{lr}"]
    assert r"last & 2 \\" in lines
    assert r"a|b *c* \_d\_ $<$e$>$ `f` \textbackslash{}g $\pm$ 50 \% -- \{h\} & 1 \\" in lines


def test_a_terminal_shows_the_title_in_one_line_and_a_line_between_parts():
    title = "a title that is longer than its table"
    lines = [
        line.strip() for line in render(Table(["x", "y"], [["a", "1"], ["b", "2"]], title, breaks=[1])).splitlines()
    ]
    assert lines[0] == title
    assert lines[lines.index("a   1") + 1] == ""
    bare = render(Table(["x", "y"], [["a", "1"]], bare=True))
    assert "x" not in bare
    assert "\x1b[1m" in render(Table(["x", "y"], [["a", "1"]], bold=True, bare=True), color=True)


def test_a_notebook_shows_all_parts():
    page = Reader(TABLE.html())
    assert page.unclosed == []
    assert page.text("th") == ["", ODD]
    assert page.text("strong") == ["Title"]
    assert {"last", "2", "1"} <= {*page.text("td")}
    assert page.text("p")[-1].startswith("A note.")
