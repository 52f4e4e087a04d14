"""The ensemble of the clients' networks: members, votes, calibration, and refused members."""

import dataclasses

import pytest
import torch

from fedkern import models
from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.errors import UserError
from fedkern.methods.baselines.client_ensemble import Ensemble, vote
from fedkern.tasks import SEGMENTATION
from python_tests.saved_network import tensors

FAST = {"virtual_features": 50, "calibration_epochs": 1}


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
    """A member is the upload of FedAvg's first round, as an average over that client alone."""
    from fedkern.methods import FedAvg

    sent = {}
    real = FedAvg.client_update

    class Spy(FedAvg):
        def client_update(self, client, phase, message):
            sent[client.id] = real(self, client, phase, message)
            return sent[client.id]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedAvg, "client_update", Spy.client_update)
        run(make_config("fedavg", rounds=1), out=tmp_path / "fedavg", data=make_data())
    members = [m.state_dict() for m in read_model(plain)[0].members]
    for k, member in enumerate(members):
        total = sum(t.double().sum() for t in member.values() if t.is_floating_point())
        expected = sent[k]["parameters"].double().sum() + sent[k]["buffers"].double().sum()
        torch.testing.assert_close(total, expected)


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


def test_bytes_of_calibration(make_data, make_config, tmp_path, monkeypatch):
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
