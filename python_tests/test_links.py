"""Tests of pages: they are short, their files exist, and their programs and plugins are those of the examples."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from fedkern import __all__ as exported
from fedkern.methods import AGGREGATORS
from fedkern.run import main
from python_tests.plugin_sources import EXAMPLES, no_plugins  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("[!.]*/**/*.md")) if "build" not in path.parts
]
LINK = re.compile(r"\]\(([^)\s]+)\)|<(?:img|a)[^>]*?(?:src|href)=\"([^\"]+)\"")
NAME = re.compile(r"[\w.*/-]*\w/[\w.*/-]*\*?")

ALL_PROSE, PAGE_WORDS, README_PROSE, README_LINES = 24_000, 3_000, 1_000, 130
HIDDEN = re.compile(
    r"\A---\n.*?\n---\n|^( *)```.*?^\1```\s*?$|<!--.*?-->|\$\$.*?\$\$|<[^>]+>"
    r"|^::: [^\n]*(?:\n(?: {4}[^\n]*)?)*|^[ \t]*(?:\||!\[)[^\n]*|(?<=\])\([^)]*\)",
    re.DOTALL | re.MULTILINE,
)
"""Code, comments, formulas, directives, tables, images and addresses of links."""


def read_anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {word if not words[:i].count(word) else f"{word}-{words[:i].count(word)}" for i, word in enumerate(words)}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for match in LINK.finditer(text):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in read_anchors(target)):
            broken.append(link)
    assert not broken


def test_files_that_pyproject_names_exist() -> None:
    text = re.sub(r"https?://\S+|\"[^\"]*(?:/usr|/tmp)[^\"]*\"", "", (ROOT / "pyproject.toml").read_text())
    names = {name for name in NAME.findall(text) if "." in name or "*" in name}
    assert {"fedkern/data/sources/digits.txt", "report/pages/templates/*", ".ci/install-cuda"} <= names
    assert [name for name in names if not any(True for base in (ROOT, ROOT / "fedkern") for _ in base.glob(name))] == []


def test_every_page_is_in_the_navigation_and_every_table_on_a_page() -> None:
    docs = ROOT / "docs"
    listed = {*re.findall(r"- (?:[^:\n]+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)}
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert pages | {"index.md", "CONTRIBUTING.md"} == listed
    linked = {name for page in PAGES for name in re.findall(r"tables/([\w.-]+\.csv)\)", (ROOT / page).read_text())}
    assert {path.name for path in (docs / "tables").glob("*.csv")} == linked


def count_prose(text: str) -> int:
    """Return the number of words of a page that are prose."""
    return len(re.findall(r"\w[\w'’.,/+-]*", HIDDEN.sub("", text)))


def test_pages_are_short() -> None:
    pages = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))}
    assert len(pages) > 40
    assert {name: len(text.split()) for name, text in pages.items() if len(text.split()) > PAGE_WORDS} == {}
    assert sum(map(count_prose, pages.values())) <= ALL_PROSE
    assert count_prose(pages["README.md"]) <= README_PROSE
    assert len(pages["README.md"].splitlines()) <= README_LINES


# -- coming from -------------------------------------------------------------------------------------------------------


COMING_FROM = Path(__file__).resolve().parents[1] / "docs/coming-from.md"
TASK, *PROGRAMS = re.findall(r"```python\n((?:# task|import fedkern).*?)```", COMING_FROM.read_text(), re.DOTALL)


def test_the_programs_run(undrawn, tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for program in PROGRAMS:
        exec(compile(program.replace("rounds=2", "rounds=1, train_samples=200"), COMING_FROM.name, "exec"), {})
    del sys.modules["task"]


# -- plugin docs -------------------------------------------------------------------------------------------------------


DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = "".join((DOCS / name).read_text() for name in ("own-method.md", "plugins.md"))
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
BLOCKS = re.findall(r"^```\w*\n((?:fedkern |import fedkern).*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SMALL = {"--train-samples": "60", "--clients": "5", "--local-epochs": "1", "--threads": "1", "--width": "4",
         "--rounds": "1", "--grad-cam": "0"}  # fmt: skip


def _case(block: str) -> Any:
    """Return a block of a page, marked if other tests play the same whole runs."""
    played = re.search(r"^fedkern (fedavgm|smoothed|compare|fedavg .*--aggregator)", block)
    return pytest.param(block, marks=[pytest.mark.exhaustive] if played else [])


@pytest.mark.usefixtures("no_plugins", "undrawn")
@pytest.mark.parametrize("block", [_case(block) for block in BLOCKS])
def test_a_block_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    if block.startswith("import"):
        exec(compile(block, "block", "exec"), {})
        return
    for words in map(shlex.split, re.findall(r"^fedkern (.*)$", block.replace("\\\n", ""), re.MULTILINE)):
        looks = {"list", "--help", "--resume"} & {*words}
        small = [word for flag, value in SMALL.items() for word in (flag, value) if flag not in words and not looks]
        assert main([*words, *small]) == 0
    out = capsys.readouterr().out
    assert "--plugin top2.py" not in block or re.search(r"^ *top2 +\d", out, re.MULTILINE)


def test_the_files_are_the_examples():
    for path in EXAMPLES.glob("*.py"):
        assert FILES[path.name] == path.read_text()
    assert all(f"--plugin {name}" in PAGE for name in FILES)


def test_every_decorator_and_aggregator_is_named():
    decorators = [name for name in exported if name.startswith("register")]
    assert "register" in decorators
    for name in decorators:
        assert f"`@fedkern.{name}(" in PAGE, name
    table = PAGE[PAGE.index("| `--aggregator` | result") :].split("\n\n")[0]
    for name, entry in AGGREGATORS.items():
        assert f"| `{name}` |" in table
        for option in entry.options:
            assert f"`{option.name}={option.default}`" in table
