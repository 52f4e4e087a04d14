"""Tests of runs logged to MLflow: a mock of its client, and MLflow itself."""

import re
import sys
from unittest.mock import MagicMock

import pytest

from fedkern.cli.command_parser import parse_words, play_request
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.listeners import MLflow
from fedkern.listeners.events import scalars
from python_tests.listeners.tracked import WORDS, cut, resume


@pytest.fixture
def client(monkeypatch):
    """Return the client of a mock of mlflow, whose ``rows`` are the logged figures by tag and step."""
    module, client = MagicMock(MlflowException=RuntimeError), MagicMock(rows={})
    module.MlflowClient.return_value = client
    module.entities.Metric = module.entities.RunTag = module.entities.Param = lambda *values: values
    client.get_experiment_by_name.return_value = None
    client.create_run.return_value.info.run_id = "17"

    def log(number, metrics=(), params=(), tags=()):
        assert number == "17"
        assert not client.rows.keys() & {(name, step) for name, _, _, step in metrics}  # nothing is logged twice
        client.rows |= {(name, step): value for name, value, _, step in metrics} | dict(params)
        client.get_run.return_value.data.tags = dict(tags)

    client.log_batch = log
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return client


def test_a_resumed_run_continues_the_curve(client, tmp_path, monkeypatch):
    out = tmp_path / "run"
    cut(monkeypatch, 3, *WORDS, "--out", str(out), "--mlflow", "demo")
    client.set_terminated.assert_called_once_with("17", "FAILED")
    resume(out, "--mlflow", "demo")
    client.create_run.assert_called_once_with(client.create_experiment("demo"), run_name="run")
    client.update_run.assert_called_once_with("17", status="RUNNING")
    client.set_terminated.assert_called_with("17", "FINISHED")
    records = read_metrics(out)
    for record in (records[1], records[3]):  # round 3 was run twice
        assert all(client.rows[tag, record["round"]] == value for tag, value in scalars(record).items())
    assert client.rows["final/accuracy", 4] == records[-1]["accuracy"]
    assert client.rows["clients"] == "2"
    resume(out, "--mlflow", "demo")  # finished: nothing is logged again
    client.create_run.assert_called_once()


def test_another_experiment_has_a_run_of_its_own(client, tmp_path, monkeypatch):
    cut(monkeypatch, 3, *WORDS, "--out", str(tmp_path / "run"), "--mlflow", "demo")
    client.rows.clear()
    resume(tmp_path / "run", "--mlflow", "other")
    assert [call.args for call in client.create_experiment.call_args_list] == [("demo",), ("other",)]


def test_mistakes_are_reported_and_leave_nothing(client, tmp_path, monkeypatch):
    client.create_experiment.side_effect = RuntimeError("'p' is deleted.")
    words = [*WORDS, "--out", str(tmp_path / "run"), "--mlflow", "p"]
    with pytest.raises(UserError, match=re.escape("the experiment p ('p' is deleted): put that right, name another")):
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

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")
    out = tmp_path / "run"
    cut(monkeypatch, 3, *WORDS, "--out", str(out), "--mlflow", "demo")
    resume(out, "--mlflow", "demo")
    client = MlflowClient()
    (curve,) = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert curve.info.status == "FINISHED"
    history = client.get_metric_history(curve.info.run_id, "accuracy")
    assert [(metric.step, metric.value) for metric in history] == [
        (r["round"], r["accuracy"]) for r in read_metrics(out)
    ]
