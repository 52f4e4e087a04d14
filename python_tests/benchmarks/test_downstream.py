"""The table of downstream tasks: which figures it takes, what it repeats, and how runs share a row."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies import study_downstream
from fedkern.settings.config import RunConfig

ROWS = {
    "retrieval": [
        {"i2t_r1": 0.5, "i2t_r5": 0.75, "i2t_r10": 0.8, "t2i_r1": 0.25, "t2i_r5": 0.5, "t2i_r10": 0.9, "gallery": 9}
    ],
    "zero-shot": [{"accuracy": 0.4, "auc": 0.6}],
    "zero-shot-colour": [{"accuracy": 0.45, "auc": 0.65}],
    "probe": [{"shots": 5, "accuracy": 0.6, "auc": 0.7}, {"shots": "all", "accuracy": 0.8, "auc": 0.9}],
    "decode": [{"dice": 0.7, "iou": 0.5, "loss": 0.1}],
}
SETTINGS = {
    "retrieval": {"ks": [1, 5, 10]},
    "zero-shot": {"prompts": ""},
    "probe": {"shots": [5, 0], "features": "token", "draws": 3, "seed": 0},
    "decode": {"epochs": 5, "samples": 1000, "seed": 0},
}


def finished(folder: Path, method: str = "fedavg", scale: float = 1.0, **options: Any) -> Path:
    folder.mkdir()
    (folder / "config.toml").write_text(RunConfig.make(method, data="captions", options=options).to_toml())
    for name, rows in ROWS.items():
        task = name.partition("-colour")[0]
        scaled = [{k: scale * v if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        result = {
            "settings": SETTINGS[task],
            "rows": [{"set": which, **row} for which in ("seen", "minority", "unseen") for row in scaled],
        }
        (folder / f"{name}.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        raise AssertionError(command)

    monkeypatch.setattr(subprocess, "run", run)


def test_figures_of_a_run(tmp_path: Path) -> None:
    found = study_downstream.figures(finished(tmp_path / "a"))
    assert len(found) == 2 * len(study_downstream.FIGURES)
    assert found["seen: R@1 image to text"] == 0.5
    assert (found["seen: zero-shot accuracy"], found["seen: zero-shot accuracy of colours"]) == (0.4, 0.45)
    assert found["unseen: 5-shot accuracy"] == 0.6
    assert found["seen: linear probe AUC"] == 0.9


def test_what_was_made_with_other_settings_is_made_again(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a")
    other = json.loads((folder / "decode.json").read_text()) | {"settings": {"epochs": 1, "samples": 0, "seed": 0}}
    (folder / "decode.json").write_text(json.dumps(other))
    with pytest.raises(AssertionError, match=r"decode.*--epochs.*5"):
        study_downstream.figures(folder)


def test_rows_are_means_over_runs_of_one_kind(tmp_path: Path) -> None:
    folders = [finished(tmp_path / "a"), finished(tmp_path / "b", scale=0.5)]
    folders.append(finished(tmp_path / "c", weighting="uniform"))
    assert [study_downstream.label(folder) for folder in folders] == ["fedavg", "fedavg", "fedavg weighting=uniform"]
    found = study_downstream.collect({"fedavg": folders[:2], "fedavg weighting=uniform": folders[2:]})
    seen, unseen = study_downstream.page(found).split("## Unseen clients")
    (row,) = (line for line in seen.splitlines() if line.startswith("| fedavg |"))
    assert row.split("|")[2].strip() == "37.5 ± 17.7"
    assert "| fedavg weighting=uniform | **50.0** |" in unseen
