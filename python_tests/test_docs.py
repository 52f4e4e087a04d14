"""The operators' page: its code runs, its tables are those of the recorded results, and nothing is left out."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedkern import ops

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "ops.md").read_text()
BLOCKS = re.findall(r"## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("title", "code"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_code_runs(title: str, code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, f"docs/ops.md: {title}", "exec"), names)
    made = [value for name, value in names.items() if name not in ("torch", "ops", "__builtins__")]
    made += [entry for value in made if isinstance(value, dict) for entry in value.values()]
    assert any(isinstance(value, torch.Tensor) for value in made)
    for name in title.split(", "):
        assert re.search(rf"\bops\.{name}\(", code), f"the code does not use {name}"


def test_every_operator_has_a_section() -> None:
    titles = {name for title, _ in BLOCKS for name in title.split(", ")}
    others = {"ServerStep", "StepResult", "empty_cache", "use_backend", "use_isa"}
    assert {*ops.__all__} - others == titles


@pytest.mark.exhaustive
def test_tables_are_up_to_date() -> None:
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stderr
