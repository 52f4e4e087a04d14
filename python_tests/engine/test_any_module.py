"""A one-shot method with its own modules: fit, public data, reports, and any module saved and read."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedkern.downstream.saved_network import read_model
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.local.network import Network
from fedkern.engine.run import run
from fedkern.engine.server import Server
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import FedAvg, Method, Objective, Phase, Round, register
from fedkern.methods.uploads import Number, like
from python_tests.hearing import Hearing
from python_tests.interrupted import KillAt, check_interruption

PHASE = Phase(0, "train", "update")
WIDTHS = (2, 3, 2)


class Together(nn.Module):
    """The mean of the logits of networks of any architecture."""

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images):
        return torch.stack([network(images) for network in self.networks]).mean(0)


class Stack(Objective, Method):
    """Two levels: the clients train their own networks, then their heads.

    Nothing is averaged.
    """

    one_shot = True

    def rounds(self, federation):
        yield Round("level 1", participants="all")
        yield Round("level 2", participants="all")

    def send(self, server, phase):
        return {} if phase.round == 0 else {k: {"network": server.state[str(k)]} for k in range(3)}

    def client_update(self, client, phase, message):
        network = client.network(width=WIDTHS[client.id])
        if phase.round:
            network.load_state_dict(message["network"])
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(name.startswith("head"))
        client.fit(self, phase, network, message={"weight": 0.5}, epochs=client.id + 1)
        network.eval()
        with torch.no_grad():
            right = sum(int((network(b.inputs).argmax(1) == b.targets).sum()) for b in client.in_order(7))
            client.state["public"] = torch.cat([network(b.inputs) for b in client.public.batches(4)])
        client.report["own"] = right / client.samples
        return {"network": network.state_dict(), "right": right}

    def loss(self, model, batch, received):
        loss = cross_entropy(model(batch.inputs), batch.targets)
        return received.message["weight"] * loss, {"seen": loss.detach()}

    def expects(self, server, phase, client, message):
        return {"network": like(server.build(width=WIDTHS[client]).state_dict()), "right": Number(low=0, integer=True)}

    def server_update(self, server, phase, uploads):
        total = 0
        for upload in uploads:
            server.state[str(upload.client_id)] = upload.message["network"]
            total += upload.message["right"]
        noise = float(server.rng("noise", phase).random())
        server.report[f"right_{phase.round}"] = total / sum(server.federation.samples) + noise

    def model(self, server):
        if any("head.weight" not in server.state.get(str(k), {}) for k in range(3)):
            return None
        networks = [server.build(width=width) for width in WIDTHS]
        for k, network in enumerate(networks):
            network.load_state_dict(server.state[str(k)])
        return Together(networks)


@pytest.fixture
def stack(registries):
    return register("stack")(Stack)


@pytest.fixture
def data(make_data, make_public):
    return make_public(make_data())


def make(make_config, **settings):
    return make_config("stack", rounds=None, **settings)


def test_a_plan_of_levels_is_recorded_level_by_level(stack, data, make_config, tmp_path):
    names = []
    heard = Hearing(on_round_start=lambda round, name, participants: names.append(name))
    summary = run(make(make_config), out=tmp_path, data=data, listener=heard)
    assert [entry.name for entry in heard.info.rounds] == names == ["level 1", "level 2"]
    records = read_metrics(tmp_path)
    assert [record["name"] for record in records] == ["level 1", "level 2"]
    assert records[0]["round_bytes_down"] == 0 < records[0]["round_bytes_up"] == records[1]["round_bytes_down"] + 3 * 8
    assert records[1]["bytes_up"] == sum(record["round_bytes_up"] for record in records)
    assert {"own", "loss", "seen"} <= set(records[1]["clients"]["2"])
    assert "right_0" in records[0]
    assert "right_1" not in records[0]
    assert summary["metrics"]["right_0"] == records[0]["right_0"] == records[1]["right_0"]
    assert summary["metrics"]["right_1"] == records[1]["right_1"]


def test_a_module_of_the_method_is_saved_and_read_back(stack, data, make_config, tmp_path):
    summary = run(make(make_config), out=tmp_path, data=data)
    module, about = read_model(tmp_path)
    assert isinstance(module, Together)
    assert not module.training
    assert about["method"] == "stack"
    mean, std = (torch.tensor(about[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    test = data.tests["id"]
    with torch.no_grad():
        right = (module((test.images / 255 - mean) / std).argmax(1) == test.labels).double().mean()
    assert float(right) == pytest.approx(summary["metrics"]["id_accuracy"])
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no checkpoint left"):
        read_model(tmp_path)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("hook", "count"), [("client", 1), ("client", 3), ("round", 0), ("round", 1), ("end", 0)])
def test_killed_and_resumed_it_ends_alike(hook, count, stack, data, make_config, tmp_path):
    config = make(make_config)
    check_interruption(config, tmp_path, data=data, at=KillAt(hook, count))


def test_nothing_to_evaluate_yet(stack, data, make_config, tmp_path, monkeypatch):
    build = stack.model
    monkeypatch.setattr(
        stack, "model", lambda self, server: build(self, server) if "right_1" in server.report else None
    )
    run(make(make_config), out=tmp_path, data=data)
    record, second = read_metrics(tmp_path)
    assert "id_accuracy" not in record
    assert "id_accuracy" in second


def test_rounds_are_not_a_setting_of_a_one_shot_method(stack, make_config):
    assert make(make_config).rounds == 1
    with pytest.raises(UserError, match="--rounds is not for stack"):
        make_config("stack", rounds=3)


# fit against train


class Weighted(FedAvg):
    """A method that changes its gradient, and looks at the received message."""

    def adjust_gradient(self, parameters, gradients, received):
        gradients.add_(parameters - received.parameters, alpha=0.1)


@pytest.mark.parametrize("model", ["cnn", "resnet8"])
@pytest.mark.parametrize("kind", [FedAvg, Weighted])
def test_fit_is_train_on_a_module(model, kind, make_data, make_config):
    config = make_config(
        model=model, local_epochs=2, weight_decay=1e-3, clip_norm=1.0, augment="crop-flip", lr_decay=0.9
    )
    context, phase = RunContext(config, make_data()), Phase(1, "train", "update")
    message = context.networks.initial()
    answer = Client(context, 1, {}).train(kind(), phase, message)
    client = Client(context, 1, {})
    network = client.network()
    figures = client.fit(kind(), phase, network, message=message)
    result = Network(network, context.device).read()
    for name in message:
        assert torch.equal(result[name], answer[name])
    assert client.report == figures
    assert figures["loss"] > 0


def test_fit_trains_what_requires_gradients_alone(make_data, make_config):
    context = RunContext(make_config(), make_data())
    client = Client(context, 0, {})
    network = client.network()
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="expected a parameter that requires gradients"):
        client.fit(FedAvg(), PHASE, network)
    network.head.requires_grad_(True)
    before = {name: value.clone() for name, value in network.named_parameters()}
    client.fit(FedAvg(), PHASE, network)
    changed = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert all(parameter.grad is None for parameter in network.parameters())
    client.fit(FedAvg(), PHASE, network)  # what is flat already can be trained again


def test_without_flat_vectors_nothing_was_received(make_data, make_config):
    class Looks(FedAvg):
        """A method that asks for the received network."""

        def loss(self, model, batch, received):
            return super().loss(received.model, batch, received)

    client = Client(RunContext(make_config(), make_data()), 0, {})
    with pytest.raises(ValueError, match='expected a message with "parameters"'):
        client.fit(Looks(), PHASE, client.network())


def test_both_sides_see_the_same_networks_and_the_run(make_data, make_public, make_config):
    data = make_public(make_data())
    context = RunContext(make_config(), data)
    client, server = Client(context, 2, {}), Server(context)
    for overrides in ({}, {"width": 3}, {"model": "resnet8"}, {"model": "resnet8", "width": 4, "classes": 7}):
        mine, theirs = client.network(**overrides), server.build(**overrides)
        assert mine is not theirs
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    assert mine.head.weight.shape[0] == 7
    assert server.build(model="resnet8").width == 64  # its own width, not the run's
    for side in (client, server):
        assert side.classes == ("a", "b", "c")
        assert (side.mean, side.std, side.image_shape) == (data.form.mean, data.form.std, (3, 8, 8))
        assert torch.equal(side.public.labels, data.public.labels)
    assert torch.equal(client.labels, data.clients[2].labels)
    assert server.rng("x", PHASE).random() != client.rng("x", PHASE).random()


def test_batches_are_the_stored_samples_in_order(make_data, make_config):
    data = make_data()
    client = Client(RunContext(make_config(augment="crop-flip"), data), 0, {})
    found = list(client.in_order(6))
    assert [len(batch.targets) for batch in found] == [6, 6, 6, 2]
    images = torch.cat([batch.inputs for batch in found])
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.form.mean, data.form.std))
    torch.testing.assert_close(images, (data.clients[0].images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([batch.targets for batch in found]), client.labels)
    assert not any(batch.fresh for batch in found)
    rng = client.rng("view", PHASE)
    changed = torch.cat([batch.inputs for batch in client.in_order(6, augment=True, rng=rng)])
    assert not torch.equal(changed, images)
    with pytest.raises(ValueError, match="expected a generator"):
        next(client.in_order(augment=True))
