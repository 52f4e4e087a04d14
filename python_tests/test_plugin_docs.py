"""Tests of the pages on methods and plugins: their files are those of the examples, and their code runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fedkern import __all__ as exported
from fedkern.methods import AGGREGATORS
from fedkern.run import main
from python_tests.plugin_sources import EXAMPLES, no_plugins  # noqa: F401

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
