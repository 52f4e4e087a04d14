"""Command lines in the README, the pages and the papers' data functions: all are accepted."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from fedkern.cli import extensions
from fedkern.cli.command_parser import parse_words
from fedkern.cli.request import effective_config
from fedkern.data.dataset_registry import open_code
from fedkern.run import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAPERS = sorted((ROOT / "examples" / "papers").glob("*.py"))


def commands():
    """Return the words behind ``python -m fedkern.run``, by page.

    Continued lines are joined.
    """
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in re.findall(r"(?:^|&& )(?:python -m fedkern\.run|fedkern) (.*)$", block, re.MULTILINE):
                found.append((page, line.partition(" #")[0].strip()))
    for page in PAPERS:
        text = (ast.get_docstring(ast.parse(page.read_text())) or "").replace("\\\n", " ")
        found += [(page, line) for line in re.findall(r"^ *python -m fedkern\.run (.*)$", text, re.MULTILINE)]
    return found


@pytest.mark.parametrize(
    ("page", "line"), [pytest.param(page, line, id=f"{page.stem}: {line}") for page, line in commands()]
)
def test_a_command_of_a_page_is_taken(page, line, monkeypatch, tmp_path, registries):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    if "--plugin" in words:
        pytest.skip("names what a plugin registers: the page's own tests run it")
    for name in ("one", "two", "three"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, code in re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", page.read_text(), re.DOTALL):
        (tmp_path / name).write_text(code)
    for name in extensions.flag_values(words, "--data"):
        open_code(name)
    request = parse_words(words)
    if request.command == "run":
        assert effective_config(request).method == request.method


def test_the_pages_have_commands():
    found = commands()
    assert {page for page, _ in found} >= {page for page in PAPERS if "benchmarks.studies.run" not in page.read_text()}
    assert len(found) > 40
    assert len({page for page, _ in found}) > 8


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", ["first-run", "repeatability"])
def test_a_pages_commands_and_python_run(page, tmp_path, monkeypatch):
    """The commands run in the order of the page, with fewer rounds and steps."""
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"--rounds \d+|--report|\\\n", "", (ROOT / "docs" / f"{page}.md").read_text())
    for line in re.findall(r"^fedkern (?!doctor)(.*)$", text, re.MULTILINE):
        fewer = "--rounds 2 --local-steps 2" * line.startswith(("fedavg", "compare f"))
        assert main(shlex.split(f"{line} {fewer} --quiet")) == 0
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, page, "exec"), {})
