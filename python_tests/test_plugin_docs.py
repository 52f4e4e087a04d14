"""The page on plugins: its files are those of the examples, and its commands run."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fedkern import __all__ as exported
from fedkern.methods import AGGREGATORS
from fedkern.run import main
from python_tests.plugin_sources import EXAMPLES, plugged  # noqa: F401

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "plugins.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = re.findall(r"^python -m fedkern\.run (.*)$", PAGE, re.MULTILINE)
SMALL = {"--train-samples": "60", "--clients": "5", "--local-epochs": "1", "--threads": "1", "--width": "4",
         "--rounds": "1", "--grad-cam": "0"}  # fmt: skip


def _case(command: str) -> Any:
    """Whole runs of what other tests play too take a second each."""
    played = re.search(r"^(fedavgm --plugin \S+ --method|smoothed|fedavg .*--aggregator)", command)
    return pytest.param(command, marks=[pytest.mark.exhaustive] if played else [])


@pytest.mark.usefixtures("plugged", "undrawn")
@pytest.mark.parametrize("command", [_case(command) for command in COMMANDS])
def test_a_command_runs(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    words = shlex.split(command)
    looks = "list" in words or "--help" in words
    small = [word for flag, value in SMALL.items() for word in (flag, value) if flag not in words and not looks]
    assert main([*words, *small]) == 0
    out = capsys.readouterr().out
    if "top2.py" in words:
        assert re.search(r"^ *top2 +\d", out, re.MULTILINE)


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
        for each in entry.options:
            assert f"`{each.name}={each.default}`" in table
