"""The named warnings: each appears where it should and only there."""

import math
import types

import pytest
import torch

from fedkern.engine import Listener, diagnostics, run


def test_a_healthy_run_has_none(make_data, make_config, tmp_path):
    told = {}

    class Hear(Listener):
        def on_warning(self, name, text):
            told[name] = text

    summary = run(make_config(rounds=8, local_epochs=3, width=8), out=tmp_path, data=make_data(), listener=Hear())
    assert summary["metrics"]["id_accuracy"] > 0.8
    assert summary["diagnostics"] == told == {}


def test_warnings_are_told_once(make_data, make_config, tmp_path):
    told = []

    class Hear(Listener):
        def on_warning(self, name, text):
            told.append(name)

    data = make_data()
    data.clients[0].masks[:] = False
    summary = run(make_config("fedgid", rounds=3), out=tmp_path, data=data, listener=Hear())
    assert sorted(told) == sorted(summary["diagnostics"])
    assert told.count("background-bank-empty") == 1


def test_collapsed_class():
    labels = torch.tensor([0, 1, 2, 2])
    sets = {"id_": types.SimpleNamespace(labels=labels, predictions=torch.tensor([0, 0, 2, 2]))}
    text = diagnostics.collapsed_classes(sets, ["cat", "dog", "cow"])["collapsed-class"]
    assert text.startswith('1 of 3 classes ("dog") are never predicted on the id test set')
    sets["id_"].predictions = torch.tensor([1, 0, 0, 2])
    assert diagnostics.collapsed_classes(sets, ["cat", "dog", "cow"]) == {}


def test_outlying_client():
    clients = {str(k): {"drift": 1.0 + 0.1 * k} for k in range(5)}
    assert diagnostics.outlying_drift(clients) == {}
    clients["3"]["drift"] = 20.0
    assert "client 3 is 17 times as long" in diagnostics.outlying_drift(clients)["outlying-client"]
    assert diagnostics.outlying_drift({"0": {"drift": 1.0}, "1": {"drift": 100.0}}) == {}


@pytest.mark.parametrize(
    ("metrics", "names"),
    [
        ({"id_accuracy": 0.9, "ood_accuracy": 0.5, "validation_accuracy": 0.85}, set()),
        ({"id_accuracy": 0.9, "ood_accuracy": 0.12, "validation_accuracy": 0.85}, {"chance-level"}),
        ({"id_accuracy": 0.9, "validation_accuracy": 0.7}, {"falling-accuracy"}),
    ],
)
def test_poor_metrics(metrics, names):
    assert set(diagnostics.poor_metrics(metrics, {"validation_accuracy": 0.9}, 10)) == names


@pytest.mark.parametrize(
    ("accuracy", "classes", "near"),
    [(1.0, 1, False), (0.74, 2, False), (0.54, 2, True), (0.5, 2, True), (0.149, 10, True), (0.15, 10, False),
     (0.0149, 100, True), (0.02, 100, False)],
)  # fmt: skip
def test_what_is_near_chance(accuracy, classes, near):
    assert ("chance-level" in diagnostics.poor_metrics({"accuracy": accuracy}, {}, classes)) == near


def test_observations_keep_count_mean_and_range_through_json():
    import json

    observed = diagnostics.Observations()
    for value in (1.0, 3.0, math.nan, -2.0):
        observed.add({"x": value, "samples": 7})
    back = diagnostics.Observations(json.loads(json.dumps(observed.to_dict())))
    back.add({"x": 6.0})
    result = back.summary()["x"]
    assert (result.count, result.mean, result.low, result.high) == (4, 2.0, -2.0, 6.0)
    assert set(back.summary()) == {"x"}
