"""Undefined figures, such as the Dice of masks without an object: in no mean, and with a warning."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

import fedkern
from fedkern.data import FederatedData, Split
from fedkern.engine.figures.client_figures import over_clients, with_undefined, worst_client
from fedkern.engine.figures.diagnostics import undefined_figures
from fedkern.tasks import SEGMENTATION
from python_tests import own_data

rng = np.random.default_rng(0)


def segmentation(n, objects):
    """Return images of noise.

    Sets with objects have one in every mask.
    """
    masks = np.zeros((n, 8, 8), np.int64)
    if objects:
        masks[:, 2:5, 3:6] = 1
    return rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8), masks


def multilabel(n, varied):
    labels = np.zeros((n, 2), np.uint8)
    if varied:
        labels[::2] = 1
    return rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8), labels


def federation(make, lacking, where):
    """Return three clients with their own test sets, or with parts of the run's test set.

    The client ``lacking`` has no figure.
    """
    data = FederatedData.from_arrays(
        {name: make(6, True) for name in ("Bern", "Graz", "Ulm")}, make(6, True), validation=make(4, True),
        classes=("a", "b"),
    )  # fmt: skip
    tests = [Split(*(torch.from_numpy(part) for part in make(4, k != lacking))) for k in range(3)]
    if where == "own":
        return dataclasses.replace(data, client_tests=tuple(tests))
    images, labels = (torch.cat([getattr(test, name) for test in tests]) for name in ("images", "labels"))
    joined = Split(images, labels, homes=torch.arange(3).repeat_interleave(4))
    return dataclasses.replace(data, tests={"": joined})


def play(data, out, make):
    model = "unet-small" if make is segmentation else "mlp"
    settings = {"rounds": 1, "local_epochs": 1, "threads": 1, "progress": False, "pictures": False, "width": 2}
    return fedkern.simulate("fedavg", data=data, model=model, out=out, **settings)


FIGURES = {segmentation: "dice", multilabel: "macro_auroc"}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("make", FIGURES)
@pytest.mark.parametrize("where", ["own", "part"])
@pytest.mark.parametrize("lacking", [0, 2])
def test_a_client_without_a_figure_is_in_no_mean_and_is_not_the_worst(tmp_path, make, where, lacking):
    figure = FIGURES[make]
    run = play(federation(make, lacking, where), tmp_path / "run", make)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    clients = summary["client_metrics"]
    assert clients[str(lacking)][figure] is None
    judged = [clients[str(k)][figure] for k in range(3) if k != lacking]
    assert all(0 <= value <= 1 for value in judged)
    assert summary["worst_client"]["metric"] == figure
    assert summary["worst_client"]["value"] == min(judged)
    assert summary["worst_client"]["client"] != lacking
    if where == "own":
        assert run.metrics[f"mean_client_{figure}"] == pytest.approx(sum(judged) / 2)
        assert run.metrics[f"worst_client_{figure}"] == min(judged)
    name = ("Bern", "Graz", "Ulm")[lacking]
    with (tmp_path / "run/evaluation.csv").open(newline="") as file:
        values = {row["client"]: row["value"] for row in csv.DictReader(file) if row["metric"] == figure}
    assert values[name] == ""
    assert sum(value != "" for value in values.values()) == 3  # the run's test set and two clients
    text = json.dumps(summary["diagnostics"])
    assert f"1 of 3 clients ({lacking} ({name}))" in text
    assert "; mean and worst client leave them out" in text
    assert "NaN" not in (tmp_path / "run/summary.json").read_text()
    assert run.report().exists()


@pytest.mark.parametrize("make", FIGURES)
def test_a_test_set_without_a_figure_has_none(tmp_path, make):
    data = federation(make, None, "own")
    empty = Split(*(torch.from_numpy(part) for part in make(4, False)))
    run = play(dataclasses.replace(data, tests={"id": data.tests[""], "ood": empty}), tmp_path / "run", make)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert f"id_{FIGURES[make]}" in run.metrics
    assert f"ood_{FIGURES[make]}" not in run.metrics
    assert "The out-of-distribution test set has no" in json.dumps(summary["diagnostics"])
    assert f"ood_{FIGURES[make]}" not in run.evaluate()


def test_a_metric_that_is_nan_at_a_client_is_in_no_mean(tmp_path):
    sites, test = own_data.table()
    tests = {name: Subset(test, range(start, 20)) for name, start in zip(sites, (0, 5, 19), strict=True)}
    metrics = {"auc": lambda outputs, targets: len(targets) / 20 if len(targets) > 1 else float("nan")}
    run = fedkern.simulate(
        "fedavg", data=sites, test=tests, model=own_data.Rows(), metrics=metrics, main="auc", better="max", rounds=1,
        out=tmp_path / "run", progress=False, pictures=False, workers=1,
    )  # fmt: skip
    assert (run.metrics["mean_client_auc"], run.metrics["worst_client_auc"]) == (0.875, 0.75)
    assert run.summary["worst_client"]["name"] == "site 1"
    assert run.summary["client_metrics"]["2"]["auc"] is None
    assert "1 of 3 clients (2 (site 2)) have NaN as auc" in run.summary["diagnostics"]["no-client-auc"]


def test_the_clients_that_have_a_figure_are_compared():
    class Set:
        full = None

        def __init__(self, labels):
            self.labels, self.task = torch.tensor(labels)[:, None, None].expand(-1, 2, 2), SEGMENTATION

        def __len__(self):
            return 2

    sets = {0: Set([1, 0]), 1: Set([0, 0]), 2: Set([1, 1])}
    figures = {0: {"dice": 0.5, "loss": 1.0}, 1: {"loss": 9.0}, 2: {"dice": 0.75, "loss": 2.0}}
    assert over_clients(figures, sets)["mean_client_dice"] == 0.625
    assert over_clients(figures, sets)["worst_client_loss"] == 9.0
    assert worst_client(figures, sets) == (0, "dice")
    assert worst_client({k: figures[k] for k in (1, 2)}, sets) is None  # nobody to compare with
    assert over_clients({**figures, 0: {"dice": math.nan}}, sets)["worst_client_dice"] == 0.75
    assert worst_client({k: {"loss": figures[k]["loss"]} for k in figures}, sets) == (1, "loss")
    shown = with_undefined(figures, sets)
    assert [figures["dice"] for figures in shown.values()] == [0.5, None, 0.75]
    assert undefined_figures({"": sets[0]}, shown, str)["no-client-dice"].startswith(
        "1 of 3 clients (1) have no mask with an object"
    )
