"""Baselines without federation: every client alone, and everybody's data in one place."""

import pytest
import torch

from fedkern.downstream.saved_network import read_model
from fedkern.engine.batches.images import Images
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.methods import METHODS
from fedkern.settings.config import RunConfig
from fedkern.tasks import CLASSIFICATION

SETTINGS = {"width": 2, "rounds": 2, "local_epochs": 2, "batch_size": 4, "threads": 1, "grad_cam": 0}


def start(method, out, data, **settings):
    config = RunConfig.make(method, **{**SETTINGS, "clients": len(data.clients), **settings})
    return run(config, out=out, data=data)


@pytest.mark.parametrize("method", ["local", "centralised"])
def test_with_one_client_it_is_fedavg(method, make_data, tmp_path):
    data = make_data(sizes=(20,))
    for name in ("fedavg", method):
        start(name, tmp_path / name, data)
    mine, theirs = read_model(tmp_path / method)[0], read_model(tmp_path / "fedavg")[0]
    mine = mine.members[0] if method == "local" else mine
    for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_local_tells_the_mean_over_the_clients_own_networks(make_data, tmp_path):
    data = make_data()
    summary = start("local", tmp_path, data)
    ensemble, _ = read_model(tmp_path)
    assert len(ensemble.members) == 3
    device = torch.device("cpu")
    for name in ("id", "ood"):
        evaluations = [
            CLASSIFICATION.figures(member.eval(), Images(data.tests[name], data.form, device))
            for member in ensemble.members
        ]
        found = summary["metrics"]
        for figure in ("accuracy", "loss", "confidence"):
            expected = sum(figures[figure] for figures in evaluations) / 3
            assert found[f"{name}_{figure}"] == pytest.approx(expected, rel=1e-5)
        assert found[f"{name}_lowest_accuracy"] == min(figures["accuracy"] for figures in evaluations)
        assert found[f"{name}_highest_accuracy"] == max(figures["accuracy"] for figures in evaluations)
    total, second = (sum(p.sum() for p in member.parameters()) for member in ensemble.members[:2])
    assert total != second
    assert summary["bytes"]["total"] == 0


def test_centralised_trains_on_everything_and_books_the_raw_data_once(make_data, tmp_path):
    data = make_data()
    summary = start("centralised", tmp_path, data)
    assert [record["clients"]["0"]["samples"] for record in read_metrics(tmp_path)] == [42, 42]
    sizes = [n * (3 * 64 + 8) for n in (20, 13, 9)]
    assert [summary["bytes"]["clients"][str(k)]["one_off_up"] for k in range(3)] == sizes
    assert summary["bytes"]["total"] == summary["bytes"]["one_off_up"] == sum(sizes)
    assert summary["clients"] == 3


def test_both_say_that_they_are_not_federated():
    for method in ("local", "centralised"):
        assert METHODS[method].description.startswith("Not federated")
