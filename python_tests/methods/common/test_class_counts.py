"""Class counts from clients, ensembles weighted by them as in FedIOD, and frozen networks."""

import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedkern import models
from fedkern.downstream.saved_network import read_model
from fedkern.engine.local.network import Network
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import METHODS, Batch, Phase
from fedkern.methods.baselines.client_ensemble import Ensemble
from fedkern.methods.common.figures import class_counts
from fedkern.methods.common.frozen import cached_rows, frozen_copy
from fedkern.methods.common.oneshot_distill import Distilled
from fedkern.tasks import MULTILABEL, TASKS

COUNTS = {"class_weights": "counts"}
MIXTURE = {"teacher_temperature": 2.0, "weight_floor": 0.3}
MEMBERS = ("ensemble", "feddf", "dense")
SMALL = {
    "ensemble": {},
    "feddf": {"distill_batch": 4, "distill_epochs": 1},
    "dense": {"nz": 4, "ngf": 2, "generator_steps": 1, "synthesis_batch": 8, "distill_batch": 4, "distill_epochs": 1},
}


@pytest.fixture
def data(make_data, make_public):
    return make_public(make_data(), samples=10)


def counts_of(data):
    return torch.stack([class_counts(SimpleNamespace(labels=c.labels, classes=data.classes)) for c in data.clients])


def test_counts_are_of_known_labels():
    client = SimpleNamespace(labels=torch.tensor([0, 2, 2, -1]), classes=("a", "b", "c", "d"))
    assert class_counts(client).tolist() == [1.0, 0.0, 2.0, 0.0]
    pixels = SimpleNamespace(labels=torch.tensor([[[0, 1], [1, -1]]]), classes=("ground", "cell"))
    assert class_counts(pixels).tolist() == [1.0, 2.0]


def test_the_ensemble_is_that_of_fediods_teachers(data, make_config, tmp_path):
    """The same networks, counts, temperature and floor give the figure that FedIOD calls its weighted ensemble."""
    settings = {"model": "cnn", "grad_cam": 0}
    config = make_config("ensemble", rounds=None, options=COUNTS | MIXTURE, local_epochs=2, **settings)
    summary = run(config, out=tmp_path / "ensemble", data=data)
    network, _ = read_model(tmp_path / "ensemble")
    counts = counts_of(data)
    floored = torch.maximum(counts, 0.3 * counts.sum(0))
    weights = floored / floored.sum(0)
    assert (weights != counts / counts.sum(0)).any()
    x = torch.randn(5, 3, 8, 8)
    logits = torch.stack([member(x) for member in network.members])
    torch.testing.assert_close(network(x), (weights[:, None] * (logits / 2).log_softmax(2)).sum(0))
    options = {"ngf": 2, "ndf": 2, "batch": 4, "student_steps": 1, "iterations": 1, **MIXTURE}
    config = make_config("fediod", rounds=1, options=options, teachers=str(tmp_path / "ensemble"), **settings)
    figures = run(config, out=tmp_path / "fediod", data=data)["metrics"]
    for test_set in data.tests:
        assert summary["metrics"][f"{test_set}_accuracy"] == figures[f"{test_set}_ensemble_weighted"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", MEMBERS)
def test_counts_travel_once_and_cost_four_bytes_a_class(method, data, make_config, tmp_path):
    for how in ("uniform", "counts"):
        options = {**SMALL[method], "class_weights": how}
        run(make_config(method, model="cnn", rounds=None, options=options), out=tmp_path / how, data=data)
    uniform, counts = (read_metrics(tmp_path / how) for how in ("uniform", "counts"))
    for record, plain in zip(counts, uniform, strict=True):
        assert record["bytes_up"] - plain["bytes_up"] == 4 * len(data.classes) * len(data.clients)
        assert record["bytes_down"] == plain["bytes_down"]
    assert counts[-1]["id_loss"] != uniform[-1]["id_loss"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["feddf", "dense"])
def test_students_follow_an_ensemble_weighed_by_counts(method, data, make_config, tmp_path, monkeypatch):
    """The networks have two architectures.

    The counts of a client whose network was refused do not count.
    """
    weights = []
    real, trained = Distilled.follow, Distilled.client_update

    def follow(self, student, teachers, *arguments):
        weights.append(teachers.weights)
        return real(self, student, teachers, *arguments)

    def diverge(self, client, phase, message):
        answer = trained(self, client, phase, message)
        if client.id == 1 and phase.exchange == "update":
            answer["parameters"][0] = float("nan")
        return answer

    monkeypatch.setattr(Distilled, "follow", follow)
    monkeypatch.setattr(Distilled, "client_update", diverge)
    options = {**SMALL[method], **COUNTS, "models": "cnn:2,cnn:2,resnet8:2"}
    run(make_config(method, model="cnn", rounds=None, options=options, on_nan="skip"), out=tmp_path, data=data)
    counts = counts_of(data)[[0, 2]]
    torch.testing.assert_close(weights[0][:, 0], counts / counts.sum(0))


def test_who_has_the_option_and_its_default():
    for name in MEMBERS:
        assert METHODS[name].Options().class_weights == "uniform"
        assert METHODS[name].Options.parse(["class_weights=counts"]).class_weights == "counts"
    for name in ("oneshot-fedavg", "ccvr", "fusefl"):
        with pytest.raises(UserError, match=f'Unknown method option "class_weights" of {name}'):
            METHODS[name].Options.parse(["class_weights=counts"], method=name)


def test_tasks_without_classes_are_refused():
    assert not any(METHODS[name].serves(TASKS["multilabel"]) for name in MEMBERS)

    class Anything(Ensemble):
        requires = frozenset({"loss"})

        def members(self, server):
            return SimpleNamespace(check=lambda: None)

    network = torch.nn.Linear(1, 1)
    server = SimpleNamespace(task=MULTILABEL, initial=dict, state={"buffers": None}, build=lambda: network)
    Anything().start(server)
    with pytest.raises(UserError, match="weighs networks class by class, and this run is for multilabel: leave it out"):
        Anything(class_weights="counts").start(server)


@pytest.mark.parametrize("option", [{"weighting": "samples"}, {"calibrate": True}])
def test_what_the_ensemble_cannot_do_beside_counts(option):
    with pytest.raises(UserError, match='"weighting" = samples weighs too and "calibrate" replaces: leave one of them'):
        Ensemble(**COUNTS, **option)


@pytest.mark.parametrize("name", MIXTURE)
@pytest.mark.parametrize("method", [*MEMBERS, "fediod"])
def test_a_mixture_by_class_is_for_counts(method, name):
    assert getattr(METHODS[method].Options(**COUNTS, **{name: MIXTURE[name]}), name) == MIXTURE[name]
    with pytest.raises(UserError, match=f'"{name}" .*are for class_weights=counts, and .*: leave them out'):
        METHODS[method].Options(class_weights="uniform", **{name: MIXTURE[name]})


def test_counts_below_zero_are_refused(data, make_config, tmp_path, monkeypatch):
    real = Ensemble.client_update

    def negative(self, client, phase, message):
        answer = real(self, client, phase, message)
        answer["classes"][0] = -1.0
        return answer

    monkeypatch.setattr(Ensemble, "client_update", negative)
    with pytest.raises(UserError, match="Client 0's upload in round 1 has classes with -1 where 0 is the least"):
        run(make_config("ensemble", model="cnn", rounds=None, options=COUNTS), out=tmp_path, data=data)


# -- frozen ------------------------------------------------------------------------------------------------------------


PHASE = Phase(0, "train", "update")


def network(seed):
    return models.build("cnn", classes=3, channels=3, image_size=16, seed=seed, width=4)


@pytest.mark.parametrize(
    ("epochs", "augmented", "statistics", "calls"),
    [(3, False, True, 2), (3, True, True, 6), (1, False, True, 2), (3, False, False, 6)],
)
def test_rows_are_kept_over_epochs_where_they_stay_the_same(epochs, augmented, statistics, calls):
    values, asked = torch.randn(5, 2), []
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=statistics)).train(not statistics)
    received = types.SimpleNamespace(round_cache={}, samples=5, epochs=epochs, model=model)
    for epoch in range(epochs):
        for rows in ([3, 1, 4], [0, 2]) if epoch == 0 else ([0, 4], [1, 2, 3]):
            rows = np.array(rows)
            images = torch.zeros(len(rows), 1, 1, 1)
            batch = Batch(images, torch.zeros(len(rows), dtype=torch.int64), rows, PHASE, epoch, augmented)

            def compute(rows=rows):
                asked.append(rows)
                return values[rows].requires_grad_().clone()

            got = cached_rows("features", batch, received, compute)
            assert torch.equal(got, values[rows])
            assert not got.requires_grad
    assert len(asked) == calls


def test_a_copy_holds_the_other_vectors_and_leaves_the_original_alone():
    original, second = (Network(network(seed), torch.device("cpu")) for seed in (1, 2))
    second.buffers.add_(torch.rand_like(second.buffers))
    original.freeze()
    original.eval_mode()
    images = torch.randn(4, 3, 16, 16)
    before = original.module(images).clone()
    made = frozen_copy(original.module, second.read())
    second.eval_mode()
    assert torch.equal(made(images), second.module(images))
    assert torch.equal(original.module(images), before)
    assert not made.training
    assert not any(p.requires_grad for p in made.parameters())


def test_without_buffers_the_copy_keeps_the_originals():
    original, second = (Network(network(seed), torch.device("cpu")) for seed in (1, 2))
    for buffer in original.module.buffers():
        buffer.add_(1)
    made = frozen_copy(original.module, {"parameters": second.parameters})
    assert torch.equal(Network(made, torch.device("cpu")).buffers, original.buffers)
