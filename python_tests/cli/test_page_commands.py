"""Every command line in the README and the pages is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedkern.cli.command_parser import parse
from fedkern.cli.request import effective

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands():
    """The words behind ``python -m fedkern.run``, by page; continued lines are joined."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in re.findall(r"(?:^|&& )(?:python -m fedkern\.run|fedkern) (.*)$", block, re.MULTILINE):
                found.append((page, line.partition(" #")[0].strip()))
    return found


@pytest.mark.parametrize(
    ("page", "line"), [pytest.param(page, line, id=f"{page.stem}: {line}") for page, line in commands()]
)
def test_a_command_of_a_page_is_taken(page, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    if "--plugin" in words:
        pytest.skip("names what a plugin registers: the page's own tests run it")
    for name in ("one", "two", "three"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    request = parse(words)
    if request.command == "run":
        assert effective(request).method == request.method


def test_the_pages_have_commands():
    found = commands()
    assert len(found) > 40
    assert len({page for page, _ in found}) > 8
