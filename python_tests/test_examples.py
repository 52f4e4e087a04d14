"""Every script under examples/ runs as it stands, and is short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "averaging": "of the trimmed mean",
    "distillation": "The student agrees with the labels on 9",
    "finished_run": "round 3: accuracy",
    "own_method": "accuracy after 3 rounds",
    "own_model": "accuracy after 3 rounds",
    "whole_models": "arrays: [(32, 20), (32,)",
}


def test_every_example_is_known() -> None:
    assert {path.stem for path in SCRIPTS} == set(SAYS)


def _case(path: Path) -> Any:
    """Whole runs take five seconds; one script stands for those of operators."""
    first = path.stem == "whole_models"
    return pytest.param(path, id=path.stem, marks=[] if first else [pytest.mark.exhaustive])


@pytest.mark.parametrize("path", [_case(path) for path in SCRIPTS])
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout
    assert not list(tmp_path.iterdir())
