"""Tests that every script and notebook under examples/ runs as it stands, and is short."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SAYS = {
    "averaging": "of the trimmed mean",
    "csv_results": "| FedAvg (PyTorch) | 3 | 76.6 ± 5.2 % |",
    "distillation": "The student agrees with the labels on 9",
    "fine_tuning": "from the trained network: 0.9",
    "finished_run": "round 3: accuracy",
    "frozen": "3,960 bytes up",
    "linear_probe": "accuracy of the probe: 0.",
    "own_dataset": "accuracy after 2 rounds: 0.",
    "own_loop": "accuracy after 3 rounds",
    "own_method": "accuracy after 3 rounds",
    "own_model": "accuracy after 3 rounds",
    "recorded_loop": "| my loop (PyTorch) | 3 | 9",
    "regression": "mean absolute error after 5 rounds: 0.3",
    "table": "accuracy after 5 rounds: 0.9",
    "text": "perplexity after 5 rounds: 2",
    "vgg16": "accuracy after 3 rounds",
    "volumes": "accuracy after 5 rounds: 1.00",
}


def test_every_example_is_known() -> None:
    assert {path.stem for path in SCRIPTS} == set(SAYS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout
    assert not list(tmp_path.iterdir())


def _kinds(notebook: Any) -> list[set[str]]:
    """Return the kinds of content that every cell of code shows."""
    code = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [{kind for output in outputs for kind in output.get("data", {"error": ""})} for outputs in code]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_tables_and_pictures(path: Path) -> None:
    assert path.stat().st_size < 150_000
    install, *shown = _kinds(json.loads(path.read_text()))
    kinds = set().union(*shown)
    assert all(shown)
    assert not install, "the first cell works in Colab alone"
    assert {"text/html", "image/png"} <= kinds
    assert "error" not in kinds


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient", reason="needs the extra [dev]")
    pytest.importorskip("ipykernel", reason="needs the extra [dev]")
    from benchmarks.notebooks import play

    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    assert _kinds(play(path, tmp_path)) == _kinds(json.loads(path.read_text()))
