"""Tests of the operators' page and README.md: their code runs, tables match the results, and nothing is missing."""

import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import fedkern
from fedkern import ops
from fedkern.listeners.events import Listener

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
    no_operators = {"ServerStep", "StepResult", "empty_cache", "use_backend", "use_isa"}
    assert {*ops.__all__} - no_operators == titles


SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


class CtrlC(Listener):
    """Listener that interrupts a run after its second round."""

    def on_round(self, record: Mapping[str, Any]) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt


def test_snippets_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    simulate, compare = fedkern.simulate, fedkern.compare

    def simulate_half(method: str, **settings: Any) -> Any:
        with suppress(KeyboardInterrupt):
            listener = CtrlC() if settings["out"] == "runs/half" else None
            return simulate(method, **{**settings, "rounds": 4, "pictures": False, "listener": listener})

    small = {"seeds": 1, "rounds": 1, "local_epochs": 1, "train_samples": 60, "width": 4, "grad_cam": 0}
    monkeypatch.setattr(fedkern, "simulate", simulate_half)
    monkeypatch.setattr(fedkern, "compare", lambda methods, **how: compare(methods, **{**how, **small}))
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    names = {"net": net, "student": torch.randn(8, 3), "teacher": torch.randn(8, 3), "maps": torch.randn(64, 3, 4, 4)}
    for code in SNIPPETS:
        exec(compile(code, "README.md", "exec"), names)
    assert (len(SNIPPETS), capsys.readouterr().out) == (4, "True\n")


@pytest.mark.exhaustive
def test_tables_are_up_to_date() -> None:
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stderr
