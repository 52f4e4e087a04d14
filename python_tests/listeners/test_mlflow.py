"""Tests of runs logged to MLflow: a stand-in with the documented calls of its client, and MLflow in a folder."""

import re
import sys
import types

import pytest

from fedkern.cli.command_parser import parse_words, play_request
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.listeners import MLflow
from fedkern.listeners.events import scalars
from python_tests.listeners.tracked import WORDS, cut, resume


def _entity(*values):
    return values


class StandIn(types.ModuleType):
    """Stand-in for mlflow, and for its client, whose store is ``runs``."""

    MlflowException = RuntimeError

    def __init__(self):
        super().__init__("mlflow")
        self.runs, self.problem = [], None
        self.entities = types.SimpleNamespace(Metric=_entity, RunTag=_entity, Param=_entity)

    def MlflowClient(self):  # noqa: N802  # mlflow's name
        return self

    def get_experiment_by_name(self, name):
        if self.problem is not None:
            raise RuntimeError(self.problem)

    def create_experiment(self, name):
        return name

    def create_run(self, experiment, run_name):
        number = str(len(self.runs))
        data = types.SimpleNamespace(tags={}, params={}, rows={})
        self.runs.append(
            types.SimpleNamespace(
                info=types.SimpleNamespace(run_id=number), data=data, name=(experiment, run_name), status=["RUNNING"]
            )
        )
        return self.runs[-1]

    def get_run(self, number):
        return self.runs[int(number)]

    def update_run(self, number, status):
        self.get_run(number).status.append(status)

    set_terminated = update_run

    def log_batch(self, number, metrics=(), params=(), tags=()):
        data = self.get_run(number).data
        data.params.update(params)
        data.tags.update(tags)
        for name, value, _, step in metrics:
            assert (name, step) not in data.rows  # no figure is logged twice
            data.rows[name, step] = value


@pytest.fixture
def mlflow(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def test_a_resumed_run_continues_the_curve(mlflow, tmp_path, monkeypatch):
    out = tmp_path / "run"
    cut(monkeypatch, 3, *WORDS, "--out", str(out), "--mlflow", "demo")
    assert {step for _, step in mlflow.runs[0].data.rows} == {1, 2, 3}
    resume(out, "--mlflow", "demo")
    (curve,) = mlflow.runs
    assert (curve.name, curve.status) == (("demo", "run"), ["RUNNING", "FAILED", "RUNNING", "FINISHED"])
    records = read_metrics(out)
    for record in (records[1], records[3]):
        for tag, value in scalars(record).items():
            assert curve.data.rows[tag, record["round"]] == value
    assert curve.data.rows["final/accuracy", 4] == records[-1]["accuracy"]
    assert curve.data.params["clients"] == "2"
    assert "mlflow" not in (out / "config.toml").read_text()
    resume(out, "--mlflow", "demo")  # finished: nothing is logged again
    assert len(mlflow.runs) == 1


def test_another_experiment_has_a_run_of_its_own(mlflow, tmp_path, monkeypatch):
    out = tmp_path / "run"
    cut(monkeypatch, 3, *WORDS, "--out", str(out), "--mlflow", "demo")
    resume(out, "--mlflow", "other")
    assert [curve.name for curve in mlflow.runs] == [("demo", "run"), ("other", "run")]
    assert {step for _, step in mlflow.runs[1].data.rows} == {3, 4}


def test_mistakes_are_reported_and_leave_nothing(mlflow, tmp_path, monkeypatch):
    mlflow.problem = "Experiment 'p' is deleted."
    message = "MLflow cannot open the experiment p (Experiment 'p' is deleted): put that right, name another experiment"
    words = [*WORDS, "--out", str(tmp_path / "run"), "--mlflow", "p"]
    with pytest.raises(UserError, match=re.escape(message)):
        play_request(parse_words(words))
    with pytest.raises(UserError, match="--mlflow is given without a value"):
        parse_words([*WORDS, "--mlflow", ""])
    with pytest.raises(UserError, match="name of an experiment"):
        MLflow(" ")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="needs mlflow: pip install "):
        play_request(parse_words(words))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_mlflow_itself(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed (pip install '.[mlflow]')")
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path / 'store.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    out = tmp_path / "run"
    cut(monkeypatch, 3, *WORDS, "--out", str(out), "--mlflow", "demo")
    resume(out, "--mlflow", "demo")
    client = MlflowClient(store)
    (curve,) = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert curve.info.status == "FINISHED"
    history = client.get_metric_history(curve.info.run_id, "accuracy")
    assert [(metric.step, metric.value) for metric in history] == [
        (r["round"], r["accuracy"]) for r in read_metrics(out)
    ]
