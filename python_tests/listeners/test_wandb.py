"""Tests of runs logged to Weights & Biases: a stand-in with wandb's documented calls, and wandb offline."""

import json
import re
import sys
import types

import pytest

from fedkern.cli.command_parser import parse_words, play_request
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.listeners import WandB
from fedkern.listeners.events import scalars
from python_tests.listeners.tracked import WORDS, cut, resume


class StandIn(types.ModuleType):
    """Stand-in for wandb: ``init``, ``Error``, and runs with ``log``, ``summary`` and ``finish``."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.problem = [], None

    def init(self, **given):
        if self.problem is not None:
            raise self.Error(self.problem)
        self.runs.append(_Run(given))
        return self.runs[-1]


class _Run:
    def __init__(self, given):
        self.given, self.rows, self.summary, self.code = given, [], {}, None

    def log(self, row, step):
        self.rows.append((step, dict(row)))

    def finish(self, exit_code):
        self.code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    made = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


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
    assert (begun.code, second.code) == (1, 0)
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
    wandb.problem = "No API key configured. Use `wandb login` to log in."
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
