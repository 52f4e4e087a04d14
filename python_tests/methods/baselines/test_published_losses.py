"""Losses of MOON, FedProto and FedNTD against their equations, MOON's previous models, and FedProto's messages."""

import copy
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from fedkern import models
from fedkern.data import normalise
from fedkern.data.sharing.holdout import hold_out
from fedkern.downstream.saved_network import read_model
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.engine.server import Server
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.record_files import read_metrics
from fedkern.methods import Batch, FedNTD, FedProto, Moon, Phase, Upload
from fedkern.methods.baselines.fedntd import not_true
from fedkern.methods.baselines.fedproto import Nearest, Personal, proto_table, prototypes
from fedkern.ops import FlatParameters
from python_tests.methods.proxies import Fixed
from python_tests.saved_network import same_network

PHASE = Phase(1, "train", "update")


def noisy_network(seed):
    made = models.build("cnn", classes=3, channels=3, image_size=16, seed=seed, width=4).double()
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):  # statistics of its own, so that eval mode means something
            buffer.normal_(generator=torch.Generator().manual_seed(seed))
    return made


@pytest.mark.parametrize(("mu", "temperature"), [(1.0, 0.5), (5.0, 0.1)])
def test_loss_of_moon_is_the_published_one(mu, temperature):
    local, glob, previous = noisy_network(1), noisy_network(2).eval(), noisy_network(3).eval()
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.randint(0, 3, (6,))
    received = types.SimpleNamespace(
        message={}, extras={"previous": {}}, model=glob, round_cache={"network": previous}, samples=6, epochs=1,
        phase=PHASE,
    )  # fmt: skip
    method = Moon(Moon.Options(mu=mu, temperature=temperature))
    batch = Batch(images, labels, np.arange(6), PHASE)
    batch.drawn = method.prepare(local, batch, received)
    loss, seen = method.loss(local, batch, received)

    z, z_glob, z_prev = (net.features(images) for net in (local, glob, previous))
    towards = torch.exp(cosine_similarity(z, z_glob) / temperature)
    away = torch.exp(cosine_similarity(z, z_prev) / temperature)
    expected = -torch.log(towards / (towards + away)).mean()
    torch.testing.assert_close(seen["loss_con"], expected.detach())
    torch.testing.assert_close(loss, cross_entropy(local.head(z), labels) + mu * expected)
    loss.backward()
    assert all(p.grad is not None for p in local.parameters())
    assert all(p.grad is None for net in (glob, previous) for p in net.parameters())


def test_previous_equal_to_global_gives_log_two_and_no_gradient():
    local, glob = noisy_network(1), noisy_network(2).eval()
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.randint(0, 3, (6,))
    received = types.SimpleNamespace(
        message={}, extras={"previous": {}}, model=glob, round_cache={"network": glob}, samples=6, epochs=1, phase=PHASE
    )
    batch = Batch(images, labels, np.arange(6), PHASE)
    batch.drawn = Moon().prepare(local, batch, received)
    loss, seen = Moon().loss(local, batch, received)
    torch.testing.assert_close(seen["loss_con"], torch.tensor(2.0, dtype=torch.float64).log())
    loss.backward()
    with_contrast = [p.grad.clone() for p in local.parameters()]
    local.zero_grad()
    cross_entropy(local(images), labels).backward()
    for a, p in zip(with_contrast, local.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_the_first_round_is_fedavg_bit_for_bit(make_data, make_config, tmp_path):
    for method in ("fedavg", "moon"):
        run(make_config(method, rounds=1), out=tmp_path / method, data=make_data())
    assert same_network(tmp_path / "fedavg", tmp_path / "moon")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("buffers", ["average", "local", "drop"])
def test_the_previous_model_stays_with_the_client(buffers, make_data, make_config, tmp_path):
    kept = {}

    class Watched(Moon):
        def client_update(self, client, phase, message):
            if phase.round:
                assert torch.equal(client.state["previous"]["parameters"], kept[client.id])
            result = super().client_update(client, phase, message)
            kept[client.id] = result["parameters"].clone()
            return result

        def loss(self, model, batch, received):
            result = super().loss(model, batch, received)
            if received.phase.round:
                flat = FlatParameters(copy.deepcopy(self._previous(received)))
                torch.testing.assert_close(flat.parameters, received.extras["previous"]["parameters"])
            return result

    import fedkern.methods.method_registry as registry

    before = registry.METHODS["moon"]
    registry.METHODS["moon"] = Watched
    try:
        summary = run(make_config("moon", buffers=buffers, local_epochs=2), out=tmp_path / "moon", data=make_data())
    finally:
        registry.METHODS["moon"] = before
    plain = run(make_config("fedavg", buffers=buffers, local_epochs=2), out=tmp_path / "avg", data=make_data())
    assert summary["bytes"] == plain["bytes"]
    state = Checkpoints(tmp_path / "moon")
    state.open()
    assert torch.equal(state.client_state(1)["previous"]["parameters"], kept[1])


# -- fedproto ----------------------------------------------------------------------------------------------------------


def network(seed=1):
    return models.build("cnn", classes=3, channels=3, image_size=8, seed=seed, width=2)


@pytest.mark.parametrize("lam", [1.0, 0.2])
def test_loss_of_fedproto_is_the_published_one(lam):
    local = network().double()
    images, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 2, 1])
    sent = {"classes": torch.tensor([0, 2]), "means": torch.randn(2, local.width)}
    received = SimpleNamespace(message={"prototypes": sent}, round_cache={})
    method, batch = FedProto(FedProto.Options(lam=lam)), Batch(images, labels, np.arange(6), PHASE)
    batch.drawn = method.prepare(local, batch, received)
    loss, seen = method.loss(local, batch, received)

    features = local.features(images)
    means = {0: sent["means"][0].double(), 2: sent["means"][1].double()}
    # The released code: the mean squared error to the prototypes, where a class without one is its own target.
    target = torch.stack([means.get(y, f) for y, f in zip(labels.tolist(), features.detach(), strict=True)])
    expected = torch.nn.functional.mse_loss(features, target)
    torch.testing.assert_close(seen["loss_proto"], expected.detach(), check_dtype=False)
    total = cross_entropy(local.head(features), labels) + lam * expected
    torch.testing.assert_close(loss, total)
    loss.backward()
    got = [p.grad.clone() for p in local.parameters()]
    local.zero_grad()
    total.backward()
    for a, p in zip(got, local.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_a_clients_prototypes_are_its_class_means(make_data, make_config):
    client = Client(RunContext(make_config("fedproto"), make_data()), 0, {})
    net = client.network().eval()
    sent = prototypes(net, client)
    with torch.no_grad():
        features = torch.cat([net.features(batch.inputs) for batch in client.in_order(7)])
    assert sent["classes"].tolist() == sorted(set(client.labels.tolist()))
    for c, mean, count in zip(sent["classes"].tolist(), sent["means"], sent["counts"].tolist(), strict=True):
        assert count == int((client.labels == c).sum())
        torch.testing.assert_close(mean, features[client.labels == c].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_the_server_averages_what_clients_have_and_keeps_what_nobody_brought(weighting, make_data, make_config):
    method = FedProto(FedProto.Options(networks="personal", weighting=weighting))
    server = Server(RunContext(make_config("fedproto"), make_data()))
    method.start(server)

    def upload(k, classes, counts, values):
        means = torch.tensor(values)[:, None].expand(-1, 4).float()
        return Upload(k, 9, {"prototypes": {"classes": torch.tensor(classes), "means": means,
                                            "counts": torch.tensor(counts)}})  # fmt: skip

    method.server_update(server, PHASE, iter([upload(0, [0, 1], [1, 5], [1.0, 2.0]), upload(1, [0], [3], [5.0])]))
    got = server.state["prototypes"]
    assert got["classes"].tolist() == [0, 1]
    mean = 4.0 if weighting == "samples" else 3.0
    assert got["means"][:, 0].tolist() == [mean, 2.0]
    method.server_update(server, PHASE, iter([upload(2, [1, 2], [5, 5], [8.0, 7.0])]))
    got = server.state["prototypes"]
    assert got["classes"].tolist() == [0, 1, 2]
    assert got["means"][:, 0].tolist() == [mean, 8.0, 7.0]


def test_nearest_prototype_answers():
    net = network().eval()
    means, known = proto_table({"classes": torch.tensor([0, 2]), "means": torch.randn(2, net.width)}, 3)
    assert known.tolist() == [True, False, True]
    nearest = Nearest(net, means, known)
    images = torch.randn(5, 3, 8, 8)
    logits, f = nearest(images), net.features(images)
    for c in (0, 2):
        torch.testing.assert_close(logits[:, c], -((f - means[c]) ** 2).sum(1), rtol=1e-3, atol=1e-5)
    assert (logits[:, 1] == -torch.inf).all()


def test_lambda_zero_is_fedavg_bit_for_bit_and_prototypes_are_booked(make_data, make_config, tmp_path):
    data = make_data()
    a = run(make_config("fedavg"), out=tmp_path / "a", data=data)["bytes"]
    b = run(make_config("fedproto", options={"lambda": 0}), out=tmp_path / "b", data=data)["bytes"]
    run(make_config("fedproto"), out=tmp_path / "c", data=data)
    assert same_network(tmp_path / "a", tmp_path / "b")
    assert not same_network(tmp_path / "a", tmp_path / "c")
    width = network().width
    held = [len(set(client.labels.tolist())) for client in data.clients]
    assert b["up"] - a["up"] == 2 * sum(8 * c + 4 * c * width + 8 * c for c in held)  # ids, means, counts; two rounds
    everything = len(set(torch.cat([client.labels for client in data.clients]).tolist()))
    assert b["down"] - a["down"] == 3 * (8 * everything + 4 * everything * width)  # from the second round on


def test_personal_networks_stay_with_their_clients(make_data, make_config, tmp_path):
    config = make_config("fedproto", options={"networks": "personal"}, rounds=3)
    summary = run(config, out=tmp_path, data=make_data())
    state = Checkpoints(tmp_path)
    state.open()
    own = [state.client_state(k)["network"] for k in range(3)]
    assert not torch.equal(own[0]["head.weight"], own[1]["head.weight"])
    width, held = network().width, 9  # all three clients have all three classes
    assert summary["bytes"]["up"] == 3 * (16 * held + 4 * held * width)
    assert summary["bytes"]["one_off_up"] == sum(v.numel() * v.element_size() for state in own for v in state.values())
    assert all("ood_accuracy" not in record for record in read_metrics(tmp_path))

    model, _ = read_model(tmp_path)
    assert isinstance(model, Personal)
    test = RunContext(config, make_data())
    images = test.data.tests["ood"].images
    x = normalise(images, test.data.form.mean, test.data.form.std, channels_last=True)
    with torch.no_grad():
        right = [(member(x).argmax(1) == test.data.tests["ood"].labels).double().mean() for member in model.members]
    assert summary["metrics"]["ood_accuracy"] == pytest.approx(float(sum(right) / 3))


def test_personal_networks_are_tested_on_their_clients_own_samples(make_data, make_config, tmp_path):
    data = make_data((40, 26, 30))
    config = make_config("fedproto", options={"networks": "personal"}, client_test=0.3, local_epochs=4)
    metrics = run(config, out=tmp_path, data=data)["metrics"]
    own = hold_out(data, held_out=None, share=0.3, seed=config.seed).client_tests
    model, _ = read_model(tmp_path)
    assert model.clients == (0, 1, 2)
    with torch.no_grad():
        right = [
            float((member(normalise(s.images, data.form.mean, data.form.std)).argmax(1) == s.labels).double().mean())
            for member, s in zip(model.members, own, strict=True)
        ]
    assert metrics["mean_client_accuracy"] == pytest.approx(sum(right) / 3)
    assert metrics["worst_client_accuracy"] == pytest.approx(min(right))
    stranger = Personal({7: model.members[0], 9: model.members[1]})
    whole_set = Batch(normalise(own[2].images, data.form.mean, data.form.std), own[2].labels, np.arange(len(own[2])))
    asked = SimpleNamespace(batches=lambda: iter([whole_set]), task=data.task)
    expected = FedProto().evaluate_own(stranger, asked, SimpleNamespace(id=2))
    assert expected == super(FedProto, FedProto()).evaluate(stranger, asked)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("networks", "buffers"), [("averaged", "average"), ("averaged", "drop"), ("personal", "average")]
)
def test_nearest_prototypes_are_evaluated_and_saved(networks, buffers, make_data, make_config, tmp_path):
    options = {"networks": networks, "predict": "prototype"}
    summary = run(make_config("fedproto", options=options, buffers=buffers), out=tmp_path, data=make_data())
    assert 0 <= summary["metrics"]["id_accuracy"] <= 1
    model, _ = read_model(tmp_path)
    member = model.members[0] if networks == "personal" else model
    assert isinstance(member, Nearest)
    assert member.known.all()
    # Prototypes are of the features that training saw: without running statistics those of each batch's own.
    norms = [layer for layer in member.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert all(layer.training == (networks == "averaged" and buffers == "drop") for layer in norms)
    images = normalise(make_data().tests["id"].images, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), channels_last=True)
    with torch.no_grad():
        answers = model(images).argmax(1)
    if networks == "averaged":
        right = float((answers == make_data().tests["id"].labels).double().mean())
        assert summary["metrics"]["id_accuracy"] == pytest.approx(right)


# -- fedntd ------------------------------------------------------------------------------------------------------------


def parts(beta, temperature, local, glob, labels):
    n = len(labels)
    received = types.SimpleNamespace(message={}, model=Fixed(glob), round_cache={}, samples=n, epochs=1, phase=PHASE)
    batch = Batch(torch.zeros(n, 3, 4, 4), labels, np.arange(n), PHASE)
    method = FedNTD(FedNTD.Options(beta=beta, temperature=temperature))
    batch.drawn = method.prepare(local, batch, received)
    return method.loss(local, batch, received)


@pytest.mark.parametrize(("beta", "temperature"), [(1.0, 1.0), (0.3, 3.0)])
def test_loss_of_fedntd_is_the_published_one(beta, temperature):
    g = torch.Generator().manual_seed(3)
    own, glob = (3 * torch.randn(7, 5, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 2])
    local = Fixed(own)
    loss, seen = parts(beta, temperature, local, glob, labels)
    loss.backward()

    z = own.clone().requires_grad_()
    ntd = 0.0
    for i, y in enumerate(labels.tolist()):
        wrong = [c for c in range(5) if c != y]
        q_local = torch.softmax(z[i, wrong] / temperature, 0)
        q_global = torch.softmax(glob[i, wrong] / temperature, 0)
        ntd = ntd + (q_global * (q_global / q_local).log()).sum() / len(labels)
    expected = cross_entropy(z, labels) + beta * temperature**2 * ntd
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(seen["loss_ntd"], (temperature**2 * ntd).detach())
    torch.testing.assert_close(local.logits.grad, z.grad)


def test_the_true_class_is_left_to_the_labels():
    own, glob, labels = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([5, 0, 3, 3])
    local = Fixed(own)
    loss, seen = parts(1.0, 1.0, local, glob, labels)
    moved = own.clone()
    moved[torch.arange(4), labels] += 10
    torch.testing.assert_close(parts(1.0, 1.0, Fixed(moved), glob, labels)[1]["loss_ntd"], seen["loss_ntd"])
    (loss - cross_entropy(local.logits, labels)).backward()
    torch.testing.assert_close(local.logits.grad[torch.arange(4), labels], torch.zeros(4), atol=1e-7, rtol=0)
    assert (not_true(own, labels) == -torch.inf).sum() == 4


def test_nothing_to_distil_where_the_models_agree():
    logits, labels = torch.randn(4, 6), torch.tensor([5, 0, 3, 3])
    shifted = logits + torch.tensor([[1.0], [-3.0], [0.0], [7.0]])
    assert float(parts(1.0, 1.0, Fixed(logits), shifted, labels)[1]["loss_ntd"]) < 1e-6
