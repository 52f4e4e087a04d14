"""Tests of runs logged to Weights & Biases: a stand-in with wandb's documented calls, and wandb offline."""

import json
import re
import sys
from unittest.mock import MagicMock

import pytest

from fedkern.cli.command_parser import parse_words, play_request
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.listeners import WandB
from fedkern.listeners.events import scalars
from python_tests.listeners.tracked import WORDS, cut, resume


@pytest.fixture
def wandb(monkeypatch):
    """Return a mock of wandb, whose ``runs`` have what was given, logged and finished."""
    module = MagicMock(runs=[], Error=RuntimeError)

    def init(**settings):
        rows: list = []
        curve = MagicMock(given=settings, rows=rows, summary={}, log=lambda row, step: rows.append((step, dict(row))))
        module.runs.append(curve)
        return curve

    module.init.side_effect = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_resumed_run_goes_on_with_the_same_curve(wandb, tmp_path, monkeypatch):
    out = tmp_path / "run"
    cut(monkeypatch, 3, *WORDS, "--out", str(out), "--wandb", "team/demo")
    resume(out, "--wandb", "team/demo")
    begun, second = wandb.runs
    assert begun.given["id"] == second.given["id"]
    for curve in wandb.runs:
        assert (curve.given["entity"], curve.given["project"], curve.given["resume"]) == ("team", "demo", "allow")
        assert curve.given["dir"] == str(out)
        assert curve.given["config"]["clients"] == 2
        assert curve.given["settings"] == {"console": "off", "silent": True}
    assert [[step for step, _ in curve.rows] for curve in wandb.runs] == [[1, 2, 3], [4]]  # round 3 not twice
    begun.finish.assert_called_once_with(exit_code=1)
    second.finish.assert_called_once_with(exit_code=0)
    records = read_metrics(out)
    assert dict(begun.rows)[2] == scalars(records[1])
    assert second.summary["final/accuracy"] == records[-1]["accuracy"]
    assert "wandb" not in (out / "config.toml").read_text()


def test_runs_with_curves_of_their_own(wandb, tmp_path, monkeypatch):
    """One run is resumed from before the first checkpoint, another for another project."""
    out = tmp_path / "run"
    cut(monkeypatch, 1, *WORDS, "--out", str(out), "--wandb", "demo")
    cut(monkeypatch, 3, "--resume", str(out), "--wandb", "demo")
    resume(out, "--wandb", "other")
    assert len({curve.given["id"] for curve in wandb.runs}) == 3
    assert [[step for step, _ in curve.rows] for curve in wandb.runs] == [[1], [1, 2, 3], [3, 4]]
    assert [curve.given["project"] for curve in wandb.runs] == ["demo", "demo", "other"]


def test_private_records_tell_it_what_they_tell_anybody(wandb, tmp_path):
    out = tmp_path / "run"
    assert play_request(parse_words([*WORDS, "--records=private", "--out", str(out), "--wandb=p", "--quiet"])) == 0
    (only,) = wandb.runs
    assert [row for _, row in only.rows] == [scalars(record) for record in read_metrics(out)]
    assert not [tag for _, row in only.rows for tag in row if tag.startswith("clients/")]
    assert only.given["settings"]["x_disable_stats"]
    assert only.given["settings"]["x_disable_meta"]
    assert only.given["config"]["identity"].keys() == {"version"}


def test_mistakes_are_said_and_leave_nothing(wandb, tmp_path, monkeypatch):
    wandb.init.side_effect = RuntimeError("No API key configured. Use `wandb login` to log in.")
    said = "wandb cannot open the project p (No API key configured. Use `wandb login` to log in): put that right, set"
    with pytest.raises(UserError, match=re.escape(said)):
        play_request(parse_words([*WORDS, "--out", str(tmp_path / "run"), "--wandb", "p"]))
    with pytest.raises(UserError, match="--wandb is given without a value"):
        parse_words([*WORDS, "--wandb", ""])
    with pytest.raises(UserError, match="name of a project"):
        WandB("/")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs wandb: pip install "):
        play_request(parse_words([*WORDS, "--out", str(tmp_path / "run"), "--wandb", "p"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_offline_for_real(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed (pip install '.[wandb]')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    cut(monkeypatch, 3, *WORDS, "--out", str(out), "--wandb", "demo")
    resume(out, "--wandb", "demo")
    folders = sorted((out / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    known = json.loads((out / "wandb" / "fedkern.json").read_text())
    assert known["round"] == 4
    assert all(known["id"] in folder.name for folder in folders)
