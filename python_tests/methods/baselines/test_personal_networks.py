"""Personal networks: FedPer's heads, Ditto and FML against their equations, and every client alone."""

import copy
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy, one_hot, softmax

import fedkern
from fedkern import models
from fedkern.downstream.saved_network import read_model
from fedkern.engine.batches.images import Images
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.engine.server import Server
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import FML, Ditto, Phase
from fedkern.methods.baselines.fml import Pair
from fedkern.settings.config import RunConfig
from fedkern.tasks import CLASSIFICATION
from python_tests.interrupted import Kill, KillAt, outcome
from python_tests.methods.proxies import PHASE, Fixed, scene
from python_tests.personal_runs import SETTINGS, play, same


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model", ["cnn", "resnet8", "mlp"])
def test_it_keeps_the_networks_last_layer(tmp_path, model):
    settings = {"model": model, "rounds": 1}
    run = play(tmp_path / "run", "fedper", **settings)
    named = play(tmp_path / "named", "fedavg", personal="head.*", **settings)
    own = [run.model(client=k).state_dict() for k in range(3)]
    assert all(same(state, named.model(client=k).state_dict()) for k, state in enumerate(own))
    assert run.metrics == named.metrics
    assert {name for name in own[0] if not torch.equal(own[0][name], own[1][name])} == {"head.weight", "head.bias"}


def test_other_parts_can_be_named(tmp_path):
    run = play(tmp_path / "run", "fedper", rounds=1, personal=["layer3.*", "head.*"])
    left, second = (run.model(client=k).state_dict() for k in (0, 1))
    differing = {name.partition(".")[0] for name in left if not torch.equal(left[name], second[name])}
    assert differing == {"layer3", "head"}


def test_the_last_layer_of_a_network_of_a_script(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.ReLU(), nn.Linear(8, 10))
    run = play(tmp_path / "run", "fedper", model=network, width=None, rounds=1)
    left, second = (run.model(client=k).state_dict() for k in (0, 1))
    assert {name for name in left if not torch.equal(left[name], second[name])} == {"3.weight", "3.bias"}


class Scaled(nn.Module):
    """A network whose logits are not the result of a linear layer."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1024, 10)

    def forward(self, x):
        return 2 * self.line(x.flatten(1))


def test_a_network_without_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="fedper needs a linear layer with a bias as its last step"):
        play(tmp_path / "run", "fedper", model=Scaled(), width=None)


# -- ditto -------------------------------------------------------------------------------------------------------------


class Recording(Ditto):
    """Ditto that notes the images of every batch of the personal networks."""

    rows: ClassVar[list] = []

    def loss(self, model, batch, received):
        if batch.phase.exchange == "own":
            Recording.rows.append((batch.phase.round, received.samples, batch.inputs.clone(), batch.targets.clone()))
        return super().loss(model, batch, received)


def test_the_global_network_and_the_bytes_are_those_of_fedavg(tmp_path):
    average, ditto = (
        play(tmp_path / "fedavg", "fedavg", client_test=0.0, rounds=2),
        play(tmp_path / "ditto", "ditto", client_test=0.0, rounds=2),
    )
    assert same(average.model().state_dict(), ditto.model().state_dict())
    assert average.summary["bytes"] == ditto.summary["bytes"]
    losses = [[clients[k]["loss"] for k in clients] for clients in ditto.history["clients"]]
    assert losses == [[clients[k]["loss"] for k in clients] for clients in average.history["clients"]]
    assert all("loss_own" in told for told in ditto.history["clients"][0].values())


def test_personal_networks_are_those_of_the_algorithm(tmp_path):
    Recording.rows, lam = [], 0.5
    average = play(tmp_path / "average", "fedavg", rounds=1)  # what clients receive in the second round
    run = play(tmp_path / "run", Recording(**{"lambda": lam}), rounds=2)
    start = models.build("cnn", classes=10, channels=1, image_size=28, seed=0, width=2)
    received = [start.state_dict(), average.model().state_dict()]
    sizes = list(dict.fromkeys(size for _, size, *_ in Recording.rows))
    if len(sizes) < 3:
        pytest.skip("clients of one size cannot be told apart")
    for client, size in enumerate(sizes):
        own = copy.deepcopy(start).train()
        for turn in range(2):
            optimiser = torch.optim.SGD(own.parameters(), 0.05, 0.9, weight_decay=run.config.weight_decay)
            for _, _, images, targets in [row for row in Recording.rows if row[:2] == (turn, size)]:
                optimiser.zero_grad()
                distance = sum(
                    (parameter - received[turn][name]).square().sum() for name, parameter in own.named_parameters()
                )
                (cross_entropy(own(images), targets) + lam / 2 * distance).backward()
                if run.config.clip_norm:
                    nn.utils.clip_grad_norm_(own.parameters(), run.config.clip_norm)
                optimiser.step()
        found = run.model(client=client).state_dict()
        torch.testing.assert_close(found, own.state_dict(), rtol=2e-3, atol=2e-4)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.exhaustive
def test_bits_in_two_workers_and_killed_and_resumed(tmp_path):
    settings = {"sample_fraction": 0.7, "optimizer_state": "keep"}
    run, two = play(tmp_path / "one", "ditto", **settings), play(tmp_path / "two", "ditto", workers=2, **settings)
    with pytest.raises(Kill):
        play(tmp_path / "killed", "ditto", listener=KillAt("client", 1, round=2), **settings)
    resumed = fedkern.load(tmp_path / "killed").resume(progress=False, pictures=False)
    for repeated in (two, resumed):
        assert outcome(repeated.out) == outcome(run.out)
        for k in range(3):
            assert same(run.model(client=k).state_dict(), repeated.model(client=k).state_dict())
    kept = Checkpoints(run.out).last_client_state(0)
    assert {"optimizer update", "optimizer own", "own"} == {name.rsplit(" ", 1)[0] for name in kept}


def test_what_does_not_fit_is_refused(tmp_path):
    for settings, said in (
        ({"personal": "head.*"}, "ditto with these options is none"),
        ({"buffers": "local"}, "buffers=.local. is not for ditto"),
        ({"dp_clip": 1.0, "dp_noise": 1.0}, "dp_noise is not for ditto: it covers what clients upload"),
    ):
        with pytest.raises(UserError, match=said):
            play(tmp_path / "run", "ditto", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
def test_it_is_compared_by_own_and_worst_client(tmp_path):
    found = fedkern.compare(["fedavg", "fedper", "ditto"], seeds=[1], out=tmp_path / "x", **SETTINGS)
    assert [row["group"] for row in found.table] == ["fedavg", "fedper", "ditto"]
    for row in found.table:
        assert 0 <= row["worst_client_accuracy"] <= row["mean_client_accuracy"] <= 1
        assert row["bytes"] < found.table[0]["bytes"] or row["group"] != "fedper"


# -- fml ---------------------------------------------------------------------------------------------------------------


EQUAL = {"momentum": 0.9}  # the methods' own defaults differ


def test_fml_is_its_equations_with_the_other_side_detached():
    proxy, teacher, batch = scene(1)
    pair, t = Pair(Fixed(teacher[0]), proxy), 2.0
    method = FML(FML.Options(alpha=0.7, beta=0.4, temperature=t))
    total, _ = method.loss(pair, batch, None)
    total.backward()
    h, z, target = pair.private.logits.detach(), proxy.logits.detach(), one_hot(batch.targets, 5).double()

    def gradient(own, peer, weight):
        distilled = t * (softmax(own / t, 1) - softmax(peer / t, 1))
        return (weight * (softmax(own, 1) - target) + (1 - weight) * distilled) / 7

    torch.testing.assert_close(pair.private.logits.grad, gradient(h, z, 0.7), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(proxy.logits.grad, gradient(z, h, 0.4), rtol=1e-6, atol=1e-9)


def test_fml_sends_the_proxy_alone_and_keeps_private_models(make_data, make_config, tmp_path):
    data = make_data()
    plain = run(make_config("fedavg"), out=tmp_path / "a", data=data)
    summary = run(make_config("fml", options={"private": "cnn/3"}), out=tmp_path / "b", data=data)
    assert summary["bytes"] == plain["bytes"]
    states = [Client(RunContext(make_config("fml"), data), k, {}) for k in range(2)]
    method, server = FML(), Server(RunContext(make_config("fml"), data))
    method.start(server)
    for client in states:
        method.client_update(client, PHASE, method.send(server, PHASE))
    private, second = (client.state["private"]["head.weight"] for client in states)
    assert not torch.equal(private, second)
    before = private.clone()
    method.client_update(states[0], Phase(1, "train", "update"), method.send(server, PHASE))
    assert not torch.equal(states[0].state["private"]["head.weight"], before)


def test_fml_private_models_begin_apart(make_data, make_config):
    """They differ from the shared model and from each other, and are the same at every call."""
    context = RunContext(make_config("fml"), make_data())
    clients = [Client(context, k, {}) for k in range(2)]
    shared = clients[0].network().state_dict()
    private, second, again = (FML()._private(clients[k]).state_dict() for k in (0, 1, 0))
    weights = [name for name in shared if name.endswith("weight") and shared[name].dim() > 1]
    assert not any(torch.equal(private[name], shared[name]) for name in weights)
    assert not any(torch.equal(private[name], second[name]) for name in weights)
    assert all(torch.equal(private[name], again[name]) for name in private)
    assert all(torch.equal(shared[name], value) for name, value in clients[1].network().state_dict().items())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("buffers", ["average", "local"])
def test_fml_without_mutual_terms_is_fedavg(buffers, make_data, make_config, tmp_path):
    """With alpha = beta = 1 neither network affects the other, and the proxy trains as FedAvg's network."""
    data = make_data()
    run(make_config("fedavg", buffers=buffers, **EQUAL), out=tmp_path / "a", data=data)
    run(make_config("fml", options={"alpha": 1, "beta": 1}, buffers=buffers, **EQUAL), out=tmp_path / "b", data=data)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_fml_private_models_of_another_kind(make_data, make_config, tmp_path):
    with pytest.raises(UserError, match='there is no model "cn", choose one of'):
        run(make_config("fml", options={"private": "cn"}), out=tmp_path / "a", data=make_data())
    with pytest.raises(UserError, match='must be MODEL or MODEL/WIDTH, not "cnn/x"'):
        run(make_config("fml", options={"private": "cnn/x"}), out=tmp_path / "b", data=make_data())
    assert not any(tmp_path.iterdir())


# -- alone -------------------------------------------------------------------------------------------------------------


SHORT = {"width": 2, "rounds": 2, "local_epochs": 2, "batch_size": 4, "threads": 1, "grad_cam": 0}


def start(method, out, data, **settings):
    config = RunConfig.make(method, **{**SHORT, "clients": len(data.clients), **settings})
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
