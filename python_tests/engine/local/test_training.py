"""The training loop against torch.optim.SGD, and clients that diverge."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from fedkern import data as fedkern_data
from fedkern.data import normalise
from fedkern.downstream.saved_network import read_model
from fedkern.engine.batches.reader import batch_plan
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.local.network import Network
from fedkern.engine.local.training import Diverged
from fedkern.engine.run import run
from fedkern.engine.server import Server
from fedkern.errors import UserError
from fedkern.methods import FML, METHODS, FedAvg, Phase

PHASE = Phase(0, "train", "update")


def one_client(config, data, method=None):
    context = RunContext(config, data)
    message = context.networks.initial()
    client = Client(context, 0, {})
    return context, message, client, (method or FedAvg()).client_update(client, PHASE, message)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
@pytest.mark.parametrize("model", ["cnn", "resnet8"])
def test_equals_plain_sgd(model, momentum, weight_decay, clip_norm, make_data, make_config):
    data = make_data()
    config = make_config(
        model=model, momentum=momentum, weight_decay=weight_decay, clip_norm=clip_norm, local_epochs=2, batch_size=8
    )
    context, _, client, answer = one_client(config, data)

    oracle = context.networks.build().to(memory_format=torch.channels_last)
    oracle.train()
    optimiser = torch.optim.SGD(oracle.parameters(), lr=config.lr, momentum=momentum, weight_decay=weight_decay)
    split = data.clients[0]
    images = fedkern_data.normalise(split.images, data.form.mean, data.form.std, channels_last=True)
    rng = client.rng("batches", PHASE)
    for _ in range(2):
        for rows in batch_plan(len(split), 8, rng):
            optimiser.zero_grad()
            cross_entropy(oracle(images[rows]), split.labels[rows]).backward()
            if clip_norm:
                torch.nn.utils.clip_grad_norm_(oracle.parameters(), clip_norm)
            optimiser.step()
    expected = Network(oracle, torch.device("cpu")).read()
    torch.testing.assert_close(answer["parameters"], expected["parameters"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(answer["buffers"], expected["buffers"], rtol=1e-4, atol=1e-6)
    assert torch.equal(answer["integers"], expected["integers"])


def test_the_rate_drops_at_epochs_of_the_whole_run(make_data, make_config):
    settings = {"local_epochs": 2, "batch_size": 8, "lr": 0.01}
    data = make_data()

    def train(round, **changes):
        context = RunContext(make_config(**settings, **changes), data)
        phase = Phase(round, "train", "update")
        answer = Client(context, 0, {}).train(FedAvg(), phase, context.networks.initial())
        network = Client(context, 0, {}).network()
        Client(context, 0, {}).fit(FedAvg(), phase, network)
        assert torch.equal(Network(network, context.device).read()["parameters"], answer["parameters"])
        return answer["parameters"]

    steps = {"lr_steps": "3,6", "lr_step_factor": 0.5}
    assert torch.equal(train(0, **steps), train(0))  # epochs 0 and 1
    # Round 1 is epochs 2 and 3: half the rate from its second epoch on, as a drop at its epoch 1 alone.
    assert not torch.equal(train(1, **steps), train(1))
    assert torch.equal(train(1, **steps), train(1, lr_steps="3", lr_step_factor=0.5))
    assert torch.equal(train(3, **steps), train(3, lr_steps="1,2", lr_step_factor=0.5))  # epochs 6 and 7
    # So many steps are no number of epochs that all clients share: rounds count.
    short = {**steps, "local_steps": 3}
    assert torch.equal(train(2, **short), train(2, local_steps=3))
    assert torch.equal(train(3, **short), train(3, local_steps=3, lr_steps="1", lr_step_factor=0.5))
    quarter = RunContext(make_config(**{**settings, "lr": 0.0025}), data)
    expected = Client(quarter, 0, {}).train(FedAvg(), Phase(3, "train", "update"), quarter.networks.initial())
    torch.testing.assert_close(train(3, **steps), expected["parameters"])


def test_the_rate_falls_along_half_a_cosine(make_data, make_config):
    """The rates are those of torch's scheduler, stepped once an epoch as in FedIOD's released code."""
    client = Client(RunContext(make_config(local_epochs=4, lr=0.0025, lr_end=0.4), make_data()), 0, {})
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.0025)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 4, eta_min=0.001)
    rates = []
    for _ in range(5):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    schedule = client._schedule(Phase(0, "train", "update"), 10)
    assert [schedule.lr_at(epoch) for epoch in range(5)] == pytest.approx(rates)
    assert rates[1::3] == pytest.approx([0.001 + 0.0015 * (2 + 2**0.5) / 4, 0.001])
    assert schedule.lr_at(9) == schedule.lr_at(4)  # a loop of one's own may go on


def test_gradients_are_channels_last_views_of_one_vector(make_data, make_config):
    context, message, _, _ = one_client(make_config(), make_data())
    network = context.networks.get("local")
    flat = network.gradients
    flat.fill_(0)
    images = context.samples.of_client(0).pixels.take(np.arange(4))
    assert images.is_contiguous(memory_format=torch.channels_last)
    network.module(images).sum().backward()
    assert flat.abs().sum() > 0
    own = torch.cat([p.grad.flatten().abs() for p in network.module.parameters()])
    assert own.sum() == pytest.approx(float(flat.abs().sum()), rel=1e-5)
    assert flat.shape == message["parameters"].shape


class Drawing(FedAvg):
    """A method that draws a number for every batch."""

    def draw(self, client, batch, rng):
        return {"number": rng.random()}


@pytest.mark.parametrize(("method", "draws"), [(FedAvg, False), (Drawing, True)])
def test_only_a_method_that_draws_has_a_stream_for_it(method, draws, make_data, make_config, monkeypatch):
    asked = []
    real = Client.rng
    monkeypatch.setattr(Client, "rng", lambda self, name, phase: asked.append(name) or real(self, name, phase))
    one_client(make_config(batch_size=8), make_data(), method())
    assert ("background" in asked) == draws


class Observing(FedAvg):
    """A method that observes a count, one tensor changed in place, in every ``period``-th batch."""

    period = 1

    def loss(self, model, batch, received):
        found = super().loss(model, batch, received)
        count = received.round_cache.setdefault("count", torch.zeros(())).add_(1)
        self.losses.append(float(found.detach()))
        return (found, {"count": count}) if count % self.period == 0 else found


@pytest.mark.parametrize(("period", "mean"), [(1, 3.5), (2, 4.0), (7, None)])
def test_figures_are_means_over_the_batches_that_have_them(period, mean, make_data, make_config):
    method = Observing()
    method.period, method.losses = period, []
    _, _, client, _ = one_client(make_config(local_epochs=1, local_steps=6, batch_size=4), make_data(), method)
    assert client.report["loss"] == pytest.approx(np.mean(method.losses), rel=1e-6)
    assert len(method.losses) == 6
    assert client.report.get("count") == mean


class Bomb(FedAvg):
    """A method that diverges at a chosen client, round and batch."""

    where = (1, 1, 3)  # client, round and batch, rounds from 0 and batches from 1
    kind = "loss"
    count = 0

    def client_update(self, client, phase, message):
        self.client, self.count = client.id, 0
        return super().client_update(client, phase, message)

    def loss(self, model, batch, received):
        self.count += 1
        loss = super().loss(model, batch, received)
        if (self.client, received.phase.round, self.count) != self.where:
            return loss
        if self.kind == "loss":
            return loss * float("nan")
        # A finite loss with an infinite gradient.
        weight = next(model.parameters())
        return loss + (weight - weight.detach()).sum() * 3e38 * 10

    def adjust_gradient(self, parameters, gradients, received):
        pass


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_diverging_client_stops_the_run_and_is_named(kind, make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Bomb, "kind", kind)
    monkeypatch.setitem(METHODS, "fedavg", Bomb)
    with pytest.raises(UserError, match=rf"Client 1 diverged in round 2, batch 3: the {kind} is (nan|inf)"):
        run(make_config(batch_size=4), out=tmp_path, data=make_data())


def test_divergence_in_the_last_step_is_seen(make_data, make_config):
    class Steep(FedAvg):
        """A method with a finite gradient that is too large for the learning rate."""

        def loss(self, model, batch, received):
            return 1e12 * super().loss(model, batch, received)

    with pytest.raises(Diverged, match="parameters are not finite"):
        one_client(make_config(lr=1e30, batch_size=64, momentum=0.0), make_data(), Steep())


@pytest.mark.parametrize("policy", ["average", "local", "drop"])
def test_buffer_policies(policy, make_data, make_config, tmp_path):
    data = make_data()
    summary = run(make_config(buffers=policy, rounds=3), out=tmp_path, data=data)
    context = RunContext(make_config(), data)
    vectors = context.networks.initial()
    size = sum(v.numel() * v.element_size() for k, v in vectors.items() if policy == "average" or k == "parameters")
    assert summary["bytes"]["up"] == 3 * 3 * size
    assert ("no-running-statistics" in summary["diagnostics"]) == (policy != "average")
    assert summary["metrics"]["id_accuracy"] > 0.4  # the batch's own statistics make the network work
    saved, _ = read_model(tmp_path)
    images = normalise(data.tests["id"].images, data.form.mean, data.form.std)
    right = (saved(images).argmax(1) == data.tests["id"].labels).double().mean()
    assert float(right) == pytest.approx(summary["metrics"]["id_accuracy"], abs=1e-9)
    kept = load_file(tmp_path / "model.safetensors")
    assert any("running" in name for name in kept) == (policy == "average")


@pytest.mark.parametrize("policy", ["average", "local", "drop"])
def test_the_global_network_normalises_by_what_it_has(policy, make_data, make_config):
    context = RunContext(make_config(buffers=policy), make_data())
    server = Server(context)
    message = server.initial()
    assert ("buffers" in message) == (policy == "average")
    network = server.network(message)
    images = 5 * torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 3
    before = {name: value.clone() for name, value in network.state_dict().items()}
    single, together = network(images[:1]), network(images)[:1]
    # Running statistics make a sample's logits independent of its batch; the batch's own do not.
    assert torch.allclose(single, together, atol=1e-4) == (policy == "average")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_local_buffers_stay_with_their_client(make_data, make_config):
    config = make_config(buffers="local", batch_size=4)
    _, message, client, answer = one_client(config, make_data())
    assert set(answer) == {"parameters"}
    kept = copy.deepcopy(client.own_buffers)
    assert kept["integers"].tolist() == [5] * 3
    FedAvg().client_update(client, Phase(1, "train", "update"), {"parameters": message["parameters"]})
    assert client.own_buffers["integers"].tolist() == [10] * 3
    assert not torch.equal(kept["buffers"], client.own_buffers["buffers"])


def test_own_statistics_are_measured_before_they_are_fixed(make_data, make_config):
    config = make_config(buffers="local", freeze_bn_after=0, batch_size=4)
    _, message, client, _ = one_client(config, make_data())
    before = copy.deepcopy(client.own_buffers)
    assert before["integers"].tolist() == [5] * 3
    FedAvg().client_update(client, Phase(1, "train", "update"), {"parameters": message["parameters"]})
    assert torch.equal(client.own_buffers["buffers"], before["buffers"])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("fixed", [None, 1])
def test_training_alone_fixes_statistics_as_fedavg_does(fixed, make_data, make_config, tmp_path):
    for method in ("fedavg", "local"):
        config = make_config(method, model="resnet8", rounds=3, freeze_bn_after=fixed)
        run(config, out=tmp_path / method, data=make_data((20,)))
    local, federated = (load_file(tmp_path / method / "model.safetensors") for method in ("local", "fedavg"))
    assert all(torch.equal(local[f"members.0.{name}"], value) for name, value in federated.items())


def test_a_private_model_trains_with_fixed_statistics_too(make_data, make_config):
    data, message = make_data(), None
    for fixed in (None, 0):
        context = RunContext(make_config("fml", model="resnet8", freeze_bn_after=fixed), data)
        client, message = Client(context, 0, {}), context.networks.initial()
        answer = FML().client_update(client, Phase(0, "train", "update"), message)
        assert torch.equal(answer["buffers"], message["buffers"]) == (fixed is not None)
        fresh = client.network().state_dict()
        means = [name for name in fresh if name.endswith("running_mean")]
        assert all(torch.equal(client.state["private"][n], fresh[n]) for n in means) == (fixed is not None)
