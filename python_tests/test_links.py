"""Tests of pages: they are short, and files that they and pyproject.toml name exist."""

import re
from pathlib import Path

import pytest

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
