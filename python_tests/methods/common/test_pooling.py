"""Batch norm statistics of the averaged network over all clients' samples (``--buffers pool``)."""

import numpy as np
import pytest
import torch
from torch import nn

from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.rounds.ledger import message_bytes
from fedkern.engine.run import run
from fedkern.engine.server import Server
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import FedAvg, FedDRA, FedDyn, Local, Phase, Round, Upload
from fedkern.methods.common.pooling import EXCHANGES, HEADS, Pooling
from fedkern.methods.uploads import why_refused
from fedkern.ops import FlatParameters

SETTINGS = {"width": 4, "batch_size": 6, "local_steps": 1, "optimizer": "adamw", "lr": 0.003, "buffers": "pool"}
PHASES = [Phase(0, "train", name) for name in EXCHANGES]


def exchange(callee, server, clients, phase):
    """Play an exchange and return the messages to the clients and their answers."""
    sent, answers = callee.send(server, phase), []
    for client in clients:
        message = sent.get(client.id, sent)
        answers.append(callee.client_update(client, phase, message))
    callee.server_update(server, phase, iter(Upload(c.id, c.samples, a) for c, a in zip(clients, answers, strict=True)))
    return sent, answers


@pytest.fixture
def sides(make_pairs, make_config):
    def make(method, sizes=(20, 13, 9), kind=FedAvg, **options):
        config = make_config(method, **SETTINGS, options=options)
        context = RunContext(config, make_pairs(sizes))
        learner, server = kind(kind.Options.parse(options)), Server(context)
        learner.start(server)
        return learner, server, [Client(context, k, {}) for k in range(len(sizes))]

    return make


def statistics(server):
    """Return the batch norms of the server's heads, by name."""
    network = server.network(server.state)
    return {f"{head}.{i}": getattr(network, head)[i] for head in HEADS for i in (1, 4)}


def test_pooled_statistics_are_those_of_all_samples_together(sides):
    method, server, clients = sides("fedavg", weighting="samples")
    pooling = Pooling(method)
    for phase in PHASES:
        exchange(pooling, server, clients, phase)
    network = server.build().train()
    batches = [client.batch(np.arange(client.samples)) for client in clients]
    features = {
        "image_head": [network.image_align.first_token(network.encode_image(b.inputs)) for b in batches],
        "text_head": [network.text_align.first_token(network.encode_text(b.targets), b.targets.mask) for b in batches],
    }
    for head, parts in features.items():
        layers = getattr(network, head)
        for layer in layers:
            if isinstance(layer, nn.BatchNorm1d):
                layer.momentum = 1.0
        layers(torch.cat(parts))  # in train mode: every layer takes the statistics of all samples in one batch
        for i in (1, 4):
            found = statistics(server)[f"{head}.{i}"]
            assert torch.allclose(found.running_mean, layers[i].running_mean, atol=1e-5)
            assert torch.allclose(found.running_var, layers[i].running_var * 41 / 42, rtol=1e-4, atol=1e-6)


def test_the_weights_are_those_of_the_average(sides):
    found = {}
    for weighting in ("samples", "uniform"):
        method, server, clients = sides("fedavg", weighting=weighting)
        _, answers = exchange(Pooling(method), server, clients, PHASES[0])
        found[weighting] = statistics(server)["image_head.1"].running_mean.double()
        means = torch.stack([answer["image_head.1"][0] / answer["samples"] for answer in answers])
        shares = torch.tensor([20.0, 13, 9] if weighting == "samples" else [1.0, 1, 1]).double()
        assert torch.allclose(found[weighting], shares @ means / shares.sum(), atol=1e-6)
    assert not torch.allclose(found["samples"], found["uniform"], atol=1e-6)


def test_robust_weights_weigh_the_statistics_too_and_the_model_travels_once(sides):
    method, server, clients = sides("feddra", kind=FedDRA)
    server.state["weights"] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    pooling = Pooling(method)
    (model, answers), (sent, _) = (exchange(pooling, server, clients, phase) for phase in PHASES)
    own = answers[0]["image_head.1"][0] / answers[0]["samples"]
    assert answers[0]["samples"] == 18  # two are kept for its loss
    assert torch.allclose(statistics(server)["image_head.1"].running_mean.double(), own, atol=1e-6)
    asked, _ = exchange(method, server, clients, Phase(0, "train", "losses"))
    assert set(sent) == {"buffers"}
    assert set(asked) == {"buffers", "batch"}
    assert message_bytes(model) > 9 * message_bytes(asked)
    for client in clients:
        assert torch.equal(client.state["model"]["parameters"], server.state["parameters"])
        assert torch.equal(client.state["model"]["buffers"], server.state["buffers"])


def test_feddyn_is_asked_about_the_network_that_it_evaluates(sides):
    method, server, clients = sides("feddyn", kind=FedDyn)
    server.state["average"] = server.state["parameters"] * 2
    sent, _ = exchange(Pooling(method), server, clients, PHASES[0])
    assert torch.equal(sent["parameters"], server.state["average"])


@pytest.mark.parametrize(("method", "entry", "evaluated", "plan"), [
    (FedAvg(), Round(), True, ["update", *EXCHANGES]),
    (FedAvg(), Round(), False, ["update"]),
    (FedAvg(), Round(one_off=True), True, ["update"]),
    (Local(), Round(), True, ["update"]),
    (FedDRA(), Round(exchanges=("joint", "losses")), False, ["joint", *EXCHANGES, "losses"]),
    (FedDRA(FedDRA.Options(dro=False)), Round(exchanges=("joint",)), False, ["joint", *EXCHANGES]),
    (FedDRA(FedDRA.Options(dro=False, anchors=False)), Round(exchanges=("joint",)), False, ["joint"]),
])  # fmt: skip
def test_when_clients_are_asked(method, entry, evaluated, plan):
    held = Pooling(method).exchanges(entry, evaluated)
    assert [name for name, _ in held] == plan
    assert all((callee == "method") == (name not in EXCHANGES) for name, callee in held)
    assert [name for name, _ in Pooling(method, on=False).exchanges(entry, evaluated)] == list(entry.exchanges)


def test_a_run_books_the_exchanges_and_sends_no_statistics_of_its_own(make_pairs, make_config, tmp_path):
    config = make_config("fedavg", **SETTINGS, rounds=3, eval_every=2)
    summary = run(config, out=tmp_path, data=make_pairs())
    exchanges = summary["bytes"]["exchanges"]
    parameters = 4 * len(FlatParameters(RunContext(config, make_pairs()).networks.build()).parameters)
    assert exchanges["update"]["up"] == 3 * 3 * parameters
    assert 2 * 3 * parameters < exchanges["statistics"]["down"] < 2 * 3 * parameters * 1.2  # of rounds 2 and 3
    assert [record["round"] for record in read_metrics(tmp_path) if "i2t_r1" in record] == [2, 3]
    assert "no-running-statistics" not in summary["diagnostics"]


def test_damaged_statistics_are_refused(sides):
    method, server, clients = sides("fedavg")
    pooling = Pooling(method)
    sent = pooling.send(server, PHASES[0])
    honest = pooling.client_update(clients[0], PHASES[0], sent)
    declared = pooling.expects(server, PHASES[0], 0, sent)
    assert why_refused(honest, declared) == ""
    head = next(name for name in honest if name != "samples")
    spoiled = {**honest, head: honest[head] * torch.nan}
    assert why_refused(spoiled, declared) == f"holds NaN or infinite values in {head}"
    assert why_refused({**honest, "samples": 0}, declared).startswith("has samples 0")


def test_networks_whose_statistics_cannot_be_pooled_are_refused(make_data, make_config, tmp_path):
    with pytest.raises(UserError, match="image-text"):
        run(make_config("fedavg", buffers="pool"), out=tmp_path / "a", data=make_data())
    convolutions = nn.ModuleDict({"image_encoder": nn.BatchNorm2d(3), "image_head": nn.BatchNorm1d(3)})
    with pytest.raises(UserError, match="one at image_encoder"):
        Pooling(FedAvg()).check(convolutions)
