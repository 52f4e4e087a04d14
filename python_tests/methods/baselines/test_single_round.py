"""One round: FedAvg with calibration, FedCGS's classifier, and the ensemble of the clients' networks."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn

from fedkern import models
from fedkern.downstream.saved_network import read_model
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.errors import UserError
from fedkern.methods import FedAvg
from fedkern.methods.baselines.client_ensemble import Ensemble, vote
from fedkern.methods.baselines.fedcgs import FeatureStatistics
from fedkern.methods.baselines.oneshot_fedavg import OneShotFedAvg
from fedkern.methods.common.oneshot import flatten, load, refresh_statistics
from fedkern.methods.protocol import BEFORE
from fedkern.ops import FlatParameters
from fedkern.settings.config import RunConfig
from fedkern.tasks import SEGMENTATION
from python_tests.saved_network import same_network, tensors

FAST = {"virtual_features": 50, "calibration_epochs": 1}


def test_is_fedavg_with_one_round(make_data, make_config, tmp_path):
    data = make_data()
    run(make_config("fedavg", rounds=1, local_epochs=3), out=tmp_path / "a", data=data)
    run(make_config("oneshot-fedavg", model="cnn", rounds=None, local_epochs=3), out=tmp_path / "b", data=data)
    assert same_network(tmp_path / "a", tmp_path / "b")
    assert len(read_metrics(tmp_path / "b")) == 1


def test_calibration_changes_the_classifier_alone(make_data, make_config, tmp_path):
    data = make_data()
    run(make_config("oneshot-fedavg", model="cnn", rounds=None), out=tmp_path / "plain", data=data)
    config = make_config("oneshot-fedavg", model="cnn", rounds=None, options={"calibrate": True, **FAST})
    run(config, out=tmp_path / "flag", data=data)
    run(make_config("ccvr", model="cnn", rounds=None, options=FAST), out=tmp_path / "ccvr", data=data)
    plain, flag = (tensors(tmp_path / name) for name in ("plain", "flag"))
    assert same_network(tmp_path / "flag", tmp_path / "ccvr")
    changed = {name for name in plain if not torch.equal(plain[name], flag[name])}
    assert changed == {"head.weight", "head.bias"}
    before, after = read_metrics(tmp_path / "ccvr")
    assert before["accuracy" if "accuracy" in before else "id_accuracy"] is not None
    assert read_metrics(tmp_path / "plain")[0]["loss"] == before["loss"]
    assert after["round"] == 2


def test_bytes_of_calibration(make_data, make_config, tmp_path):
    """Clients send counts, means and scatters of their classes.

    The averaged network goes down a second time.
    """
    data = make_data()
    config = make_config("ccvr", model="cnn", rounds=None, options=FAST)
    run(config, out=tmp_path, data=data)
    plain, two = read_metrics(tmp_path)
    flat = FlatParameters(RunContext(config, data).networks.build())
    model = 4 * (len(flat.parameters) + len(flat.buffers)) + 8 * len(flat.integers)
    width = tensors(tmp_path)["head.weight"].shape[1]
    present = [len(set(client.labels.tolist())) for client in data.clients]
    up = sum(4 * (3 + c * (width + width * (width + 1) // 2)) for c in present)
    assert two["bytes_up"] - plain["bytes_up"] == up
    assert two["bytes_down"] - plain["bytes_down"] == plain["bytes_down"] == 3 * model


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("value", "why", "nobody"),
    [
        (float("inf"), "infinite values in scatters", "No client is left in round 2"),
        # What a declaration cannot say the pooling finds out.
        (-1.0, "class statistics of client 2 cannot be used", "statistics of every client were refused"),
    ],
)
def test_bad_statistics_are_left_out_and_named(value, why, nobody, make_data, make_config, tmp_path, monkeypatch):
    real = OneShotFedAvg.client_update

    def poison(self, client, phase, message):
        answer = real(self, client, phase, message)
        if "scatters" in answer and client.id in bad:
            answer["scatters"][0, 0] = value
        return answer

    monkeypatch.setattr(OneShotFedAvg, "client_update", poison)
    bad = {2}
    config = make_config("ccvr", model="cnn", rounds=None, options=FAST, on_nan="skip")
    summary = run(config, out=tmp_path / "one", data=make_data())
    assert why in summary["diagnostics"]["refused-upload-2"]
    assert [entry["client"] for record in read_metrics(tmp_path / "one") for entry in record.get("dropped", ())] == [2]
    with pytest.raises(UserError, match=why):
        run(config.replace(on_nan="stop"), out=tmp_path / "stop", data=make_data())
    bad = {0, 1, 2}
    with pytest.raises(UserError, match=nobody):
        run(config, out=tmp_path / "all", data=make_data())


@pytest.mark.parametrize("method", ["ccvr", "ensemble", "feddf", "dense"])
def test_running_statistics_are_needed(method, make_data, make_public, make_config, tmp_path):
    config = make_config(method, model="cnn", rounds=None, buffers="local")
    with pytest.raises(UserError, match=f"{method} needs the running statistics .* --buffers average"):
        run(config, out=tmp_path, data=make_public(make_data()))
    assert not (tmp_path / "config.toml").exists()


# -- fedcgs ------------------------------------------------------------------------------------------------------------


CLASSES, WIDTH = 4, 5
SIZES = (40, 1, 23, 64)


def clients(offset=3.0):
    """Return features with means far from zero, and labels.

    No client has class 3.
    """
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    for n in SIZES:
        labels = torch.randint(0, CLASSES - 1, (n,), generator=generator)
        yield torch.randn(n, WIDTH, generator=generator) @ mixing + offset * (labels[:, None] + 1), labels


def pool(batch=9):
    server = FeatureStatistics(CLASSES, WIDTH)
    for features, labels in clients():
        own = FeatureStatistics(CLASSES, WIDTH)
        for x, y in zip(features.split(batch), labels.split(batch), strict=True):
            own.add(x, y)
        server.merge(own.message())
    return server


def test_the_classifier_is_that_of_all_features():
    features, labels = (torch.cat(parts) for parts in zip(*clients(), strict=True))
    features = features.double()
    inverse = torch.linalg.inv(torch.cov(features.T))
    head = pool().classifier(shrinkage=False)
    for c in range(CLASSES):
        own = features[labels == c]
        mean = own.mean(0) if len(own) else features.mean(0)
        prior = torch.tensor(max(len(own), 0.5) / len(features)).log()
        torch.testing.assert_close(head.weight[c].double(), inverse @ mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(head.bias[c].double(), prior - mean @ inverse @ mean / 2, rtol=1e-4, atol=1e-4)
    right = head(features.float()).argmax(1) == labels
    assert right.float().mean() > 0.8


def test_shrinkage_serves_fewer_samples_than_features():
    statistics = FeatureStatistics(2, 8)
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    statistics.add(features, torch.tensor([0, 0, 1, 1]))
    assert torch.isfinite(statistics.classifier(shrinkage=True).weight).all()
    with pytest.raises(UserError, match=r"covariance of the 8 features of 4 samples has no inverse: take shrinkage="):
        statistics.classifier(shrinkage=False)


def test_means_that_no_class_counts_are_refused():
    own = FeatureStatistics(CLASSES, WIDTH)
    own.add(*next(clients()))
    message = own.message()
    server = FeatureStatistics(CLASSES, WIDTH)
    with pytest.raises(ValueError, match="2 means came for 3 classes"):
        server.merge({**message, "means": message["means"][:2]})
    with pytest.raises(ValueError, match="must not be negative on the diagonal"):
        server.merge({**message, "scatter": -message["scatter"]})
    assert server.samples == 0


@pytest.mark.usefixtures("forked_workers")
def test_a_run_changes_the_classifier_alone_and_counts_its_bytes(make_data, make_config, tmp_path):
    data, config = make_data(), make_config("fedcgs", model="cnn", rounds=None)
    run(config, out=tmp_path / "one", data=data)
    run(make_config("fedcgs", model="cnn", rounds=None, workers="2"), out=tmp_path / "two", data=data)
    single, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(single[name], two[name]) for name in single)
    start = RunContext(config, data).networks.build().state_dict()
    assert {name for name in single if not torch.equal(single[name], start[name])} == {"head.weight", "head.bias"}
    (record,) = read_metrics(tmp_path / "one")
    classes, width = single["head.weight"].shape
    present = sum(len(set(client.labels.tolist())) for client in data.clients)
    numbers = len(data.clients) * (classes + width + width * (width + 1) // 2) + present * width
    assert record["bytes_up"] == 4 * numbers


def test_random_filters_serve_without_training(tmp_path):
    """Without the ReLU they reach 94 %, and without the grid 81 %."""
    config = RunConfig.make("fedcgs", data="digits", partition="classes:2", model="random-filters", threads=1)
    assert run(config, out=tmp_path / "run")["metrics"]["accuracy"] > 0.955


# -- client ensemble ---------------------------------------------------------------------------------------------------


def id_test(data, name="id"):
    split = data.tests[name]
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (data.form.mean, data.form.std))
    return (split.images / 255 - mean) / std, split.labels


@pytest.fixture
def plain(played_once, make_data, make_config):
    """Return the folder of a run with the method's defaults."""
    config = make_config("ensemble", model="cnn", rounds=None)
    return played_once("plain", lambda out: run(config, out=out, data=make_data()))


def test_vote_and_its_ties():
    sure, unsure = [0.0, 5.0, 0.0], [0.2, 0.0, 0.1]
    logits = torch.tensor([[sure, sure, unsure], [unsure, [9.0, 0, 0], unsure], [unsure, unsure, sure]])
    # two of three; one each in the sum of counts decided by probability; two against one
    assert vote(logits).tolist() == [0, 0, 0]
    tie = torch.tensor([[[3.0, 0.0, 0.0]], [[0.0, 4.0, 0.0]]])
    assert vote(tie).tolist() == [1]
    assert vote(tie.flip(0)).tolist() == [1]


def test_members_figures_and_memory(plain, make_data):
    data, summary = make_data(), read_summary(plain)
    network, about = read_model(plain)
    assert isinstance(network, models.Ensemble)
    assert about["method"] == "ensemble"
    images, labels = id_test(data)
    logits = torch.stack([m(images) for m in network.members])
    figures = summary["metrics"]
    assert figures["id_accuracy"] == pytest.approx((logits.mean(0).argmax(1) == labels).float().mean().item())
    assert figures["id_vote_accuracy"] == pytest.approx((vote(logits) == labels).float().mean().item())
    p = logits.softmax(2).mean(0)
    assert figures["id_probability_accuracy"] == pytest.approx((p.argmax(1) == labels).float().mean().item())
    size = sum(t.numel() * t.element_size() for t in network.members[0].state_dict().values())
    assert figures["memory_ratio"] == (3 * size + 3 * 4) / size  # the members, and their weights in the mean
    assert figures["members"] == 3
    assert summary["bytes"]["up"] == summary["bytes"]["down"]  # one network each way for every client


def test_a_member_is_the_network_that_its_client_trains(plain, make_data, make_config, tmp_path):
    """A member is the upload of FedAvg's first round, with the statistics of the client's samples in batch norm."""
    sent = {}
    real = FedAvg.client_update

    class Spy(FedAvg):
        def client_update(self, client, phase, message):
            sent[client.id] = real(self, client, phase, message)
            return sent[client.id]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedAvg, "client_update", Spy.client_update)
        run(make_config("fedavg", rounds=1), out=tmp_path / "fedavg", data=make_data())
    data = make_data()
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (data.form.mean, data.form.std))
    for k, member in enumerate(read_model(plain)[0].members):
        expected = copy.deepcopy(member)
        load(flatten(expected), sent[k])
        update_bn([(data.clients[k].images / 255 - mean) / std], expected)
        torch.testing.assert_close(member.state_dict(), expected.state_dict())


def test_statistics_are_those_of_a_pass_over_the_samples(make_data, make_config, monkeypatch):
    """Frozen batch norms keep theirs."""
    client = Client(RunContext(make_config("ensemble", model="cnn", rounds=None), make_data()), 0, {})
    monkeypatch.setattr(type(client.task), "outside", 4)
    rows = np.arange(3, 12)
    module, expected = client.network(), client.network()
    order = client.rng("batch norm", BEFORE).permutation(rows)
    update_bn([client.batch(order[part]).inputs for part in (slice(0, 3), slice(3, 6), slice(6, 9))], expected)
    refresh_statistics(client, module, rows)
    torch.testing.assert_close(module.state_dict(), expected.state_dict())
    norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert {(layer.momentum, layer.training) for layer in norms} == {(0.1, False)}
    norms[0].requires_grad_(False)
    refresh_statistics(client, module)
    statistics = module.state_dict()
    changed = {name for name, value in expected.state_dict().items() if not torch.equal(value, statistics[name])}
    assert {name[:6] for name in changed} == {"layer2", "layer3"}


def test_calibrated_on_all_features(plain, make_data, make_config, tmp_path):
    data, uncalibrated = make_data(), tensors(plain)
    for pool, width in (("concat", 24), ("mean", 8)):
        out = tmp_path / pool
        run(
            make_config("ensemble", model="cnn", rounds=None, options={"calibrate": True, "pool": pool, **FAST}),
            out=out,
            data=data,
        )
        calibrated = tensors(out)
        assert calibrated["head.weight"].shape == (3, width)
        assert all(torch.equal(calibrated[name], value) for name, value in uncalibrated.items())
        before, after = read_metrics(out)
        assert before["id_loss"] != after["id_loss"]
        assert before["id_vote_accuracy"] == after["id_vote_accuracy"]  # the vote stays the members' own
        network, _ = read_model(out)
        images, labels = id_test(data)
        assert after["id_accuracy"] == pytest.approx((network(images).argmax(1) == labels).float().mean().item())


def test_bytes_of_calibrated_ensembles(make_data, make_config, tmp_path, monkeypatch):
    """A client gets all members except its own network.

    A client whose network was refused is told so.
    """
    data, options = make_data(), {"calibrate": True, **FAST}
    config = make_config("ensemble", model="cnn", rounds=None, options=options)
    run(config, out=tmp_path / "all", data=data)
    everyone, two = read_metrics(tmp_path / "all")
    network = everyone["bytes_up"] / 3
    assert two["bytes_down"] - everyone["bytes_down"] == 3 * 2 * network
    monkeypatch.setattr(Ensemble, "client_update", poison(not_a_number))
    run(config.replace(on_nan="skip"), out=tmp_path / "two", data=data)
    everyone, two = read_metrics(tmp_path / "two")
    assert two["bytes_down"] - everyone["bytes_down"] == (1 + 2 + 1) * network + 8
    assert read_model(tmp_path / "two")[0].head.in_features == 16


def test_networks_may_differ(make_data, make_config, tmp_path):
    data = make_data()
    options = {"models": "cnn:2, resnet8:3", "calibrate": True, **FAST}
    summary = run(make_config("ensemble", model="cnn", rounds=None, options=options), out=tmp_path, data=data)
    network, _ = read_model(tmp_path)
    assert [type(m).__name__ for m in network.members] == ["CNN", "ResNet", "CNN"]
    assert network.widths == [8, 12, 8]
    assert network.head.in_features == 28
    assert summary["metrics"]["memory_ratio"] > 3
    bytes_down = read_metrics(tmp_path)[0]["bytes_down"]
    assert bytes_down == 0  # nobody needs another's starting point


def test_weights_by_samples(make_data, make_config, tmp_path):
    config = make_config("ensemble", model="cnn", rounds=None, options={"weighting": "samples"})
    run(config, out=tmp_path, data=make_data(sizes=(20, 10, 10)))
    assert read_model(tmp_path)[0].weights.tolist() == [0.5, 0.25, 0.25]


def poison(how):
    real = Ensemble.client_update

    def client_update(self, client, phase, message):
        answer = real(self, client, phase, message)
        if client.id == 1 and phase.exchange == "update":
            how(answer)
        return answer

    return client_update


def not_a_number(answer):
    answer["buffers"][0] = float("nan")


def too_large(answer):
    answer["parameters"].fill_(3e38)


def test_an_unsound_member_is_left_out_and_named(make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Ensemble, "client_update", poison(too_large))
    config, why = (
        make_config("ensemble", model="cnn", rounds=None),
        "The network of client 1 cannot be used: its logits",
    )
    with pytest.raises(UserError, match=why):
        run(config, out=tmp_path / "stop", data=make_data())
    summary = run(config.replace(on_nan="skip"), out=tmp_path, data=make_data())
    assert summary["diagnostics"]["refused-upload-1"].startswith(why)
    assert len(read_model(tmp_path)[0].members) == 2


@pytest.mark.parametrize(("text", "words"), [
    ("cnn,resnet9", 'there is no model "resnet9".*Did you mean "resnet8"'),
    ("cnn:wide", 'width of cnn must be a positive number, not "wide"'),
    ("cnn:0", "width of cnn must be a positive number"),
    ("cnn:²", 'width of cnn must be a positive number, not "²"'),
    ("cnn,", 'there is no model ""'),
])  # fmt: skip
def test_bad_lists_of_models(text, words, make_data, make_config, tmp_path):
    with pytest.raises(UserError, match=words):
        run(make_config("ensemble", model="cnn", rounds=None, options={"models": text}), out=tmp_path, data=make_data())
    assert not (tmp_path / "config.toml").exists()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ensemble", {"models": "cnn,unet"}), ("dense", {"models": "unet"}), ("fediod", {"models": "cnn,unet"}),
        ("fediod", {"models": "cnn,cnn,cnn,unet"}), ("fusefl", {"models": "cnn,unet"}), ("fml", {"private": "unet/2"}),
    ],
)  # fmt: skip
def test_every_network_is_for_the_datas_task(method, options, make_data, make_config, refuses, tmp_path):
    rounds = 1 if method in ("fediod", "fml") else None
    with refuses(r"The network unet gives classes of pixels, and .* choose one of cnn, ", "x"):
        run(make_config(method, model="cnn", rounds=rounds, options=options), out=tmp_path / "x", data=make_data())


@pytest.mark.parametrize("method", ["ensemble", "feddf", "fediod"])
def test_and_so_is_every_one_of_a_segmentation(method, make_data, make_config, refuses, tmp_path):
    data = make_data()
    maps = tuple(
        dataclasses.replace(s, labels=torch.zeros(len(s), 8, 8, dtype=torch.int64), task=SEGMENTATION)
        for s in data.clients
    )
    tests = {name: dataclasses.replace(s, labels=torch.zeros(len(s), 8, 8, dtype=torch.int64), task=SEGMENTATION)
             for name, s in data.tests.items()}  # fmt: skip
    data = dataclasses.replace(data, clients=maps, tests=tests, validation=tests["id"], public=tests["ood"])
    config = make_config(method, model="unet-small", rounds=1 if method == "fediod" else None,
                         options={"models": "unet-small:2,cnn"})  # fmt: skip
    with refuses(r"The network cnn gives classes of images, and .* choose one of unet", "x"):
        run(config, out=tmp_path / "x", data=data)
