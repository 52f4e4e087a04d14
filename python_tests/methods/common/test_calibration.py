"""Classifier calibration, and batch norm statistics over all clients' samples."""

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
from fedkern.methods.common import calibration
from fedkern.methods.common.pooling import EXCHANGES, HEADS, Pooling
from fedkern.methods.uploads import why_refused
from fedkern.ops import FlatParameters

CLASSES, WIDTH = 4, 5
SIZES = (40, 1, 23, 64)


def samples(offset: float = 3.0):
    """Return clients' features and labels: class 3 nowhere, class 2 once, at one client.

    The means are far from zero.
    """
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    clients = []
    for k, n in enumerate(SIZES):
        labels = torch.randint(0, 2, (n,), generator=generator)
        if k == 3:
            labels[7] = 2
        features = torch.randn(n, WIDTH, generator=generator) @ mixing + offset * (labels[:, None] + 1) + 0.3 * k
        clients.append((features, labels))
    return clients


def pool(clients, *, batch=9, **kind):
    server = calibration.ClassStatistics(CLASSES, WIDTH, **kind)
    for features, labels in clients:
        own = calibration.ClassStatistics(CLASSES, WIDTH, diagonal=server.diagonal)
        for x, y in zip(features.split(batch), labels.split(batch), strict=True):
            own.add(x, y)
        server.merge(own.message())
    return server


def concatenate(clients):
    return torch.cat([x for x, _ in clients]).double(), torch.cat([y for _, y in clients])


@pytest.mark.parametrize("diagonal", [False, True])
def test_pooled_covariance_is_the_sample_covariance_of_all_features(diagonal):
    clients = samples()
    features, labels = concatenate(clients)
    statistics = pool(clients, diagonal=diagonal)
    assert statistics.counts.tolist() == [*torch.bincount(labels, minlength=CLASSES)]
    for c in (0, 1):
        own = features[labels == c]
        expected = own.var(0) if diagonal else torch.cov(own.T)
        torch.testing.assert_close(statistics.covariances()[c], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(statistics.means[c], own.mean(0), rtol=1e-6, atol=1e-6)
    assert statistics.covariances()[2:].eq(0).all()


def test_the_released_formula_is_an_uncentred_moment():
    clients = samples()
    features, labels = concatenate(clients)
    found = pool(clients, compat=True)
    own = features[labels == 0]
    exact = torch.cov(own.T)
    assert (found.covariances()[0] - exact).abs().max() > 5  # the means' outer product stays in
    expected = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for x, y in clients:
        part = x[y == 0].double()
        if len(part):
            mean = part.mean(0)
            population = (part - mean).T @ (part - mean) / len(part)
            expected += (len(part) - 1) * population + len(part) * torch.outer(mean, mean)
    torch.testing.assert_close(found.covariances()[0], expected / (len(own) - 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.means, pool(clients).means)


def test_pooling_keeps_its_digits_far_from_zero():
    clients = [(x.double() + 1e4, y) for x, y in samples()]
    features, labels = concatenate(clients)
    pool = calibration.ClassStatistics(CLASSES, WIDTH)
    for x, y in clients:
        pool.add(x, y)
    torch.testing.assert_close(pool.covariances()[0], torch.cov(features[labels == 0].T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("diagonal", [False, True])
def test_what_is_sent(diagonal):
    features, labels = samples()[0]
    statistics = calibration.ClassStatistics(CLASSES, WIDTH, diagonal=diagonal)
    statistics.add(features, labels)
    message = statistics.message()
    numbers = WIDTH if diagonal else WIDTH * (WIDTH + 1) // 2
    assert message["means"].shape == (2, WIDTH)
    assert message["scatters"].shape == (2, numbers)
    assert message["counts"].tolist() == [*torch.bincount(labels, minlength=CLASSES)]
    assert {t.element_size() for t in message.values()} == {4}


def test_shrinkage_follows_the_number_of_samples():
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([3.0, 1.0, 0.5, 0.2, 0.1])
    for diagonal in (False, True):
        distances = []
        for n in (2, 20, 20_000):
            statistics = calibration.ClassStatistics(2, WIDTH, diagonal=diagonal)
            statistics.add(torch.randn(n, WIDTH, generator=generator) * scales, torch.zeros(n, dtype=torch.int64))
            statistics.add(torch.ones(1, WIDTH), torch.ones(1, dtype=torch.int64))
            exact, pulled = statistics.covariances()[0], calibration.shrink_covariances(statistics)
            variances = pulled if diagonal else pulled.diagonal(dim1=1, dim2=2)
            total = exact.sum() if diagonal else exact.trace()
            assert variances[0].sum().item() == pytest.approx(total.item())
            torch.testing.assert_close(variances[1], variances[0].mean().expand(WIDTH))  # a single sample
            distances.append(((pulled[0] - exact).norm() / exact.norm()).item())
        assert distances[0] > distances[1] > distances[2]
        assert distances[2] < 1e-3


@pytest.mark.parametrize("diagonal", [False, True])
def test_virtual_features_have_the_moments(diagonal, monkeypatch):
    monkeypatch.setattr("fedkern.methods.common.calibration.PORTION_BYTES", 200_000)
    statistics = pool(samples(), diagonal=diagonal)
    portions = list(calibration.virtual_features(statistics, np.random.default_rng(0), 8000))
    assert len(portions) > 1
    for x, y in portions:
        assert torch.bincount(y, minlength=CLASSES).tolist() == [len(x) // 3] * 3 + [0]
    features, labels = (torch.cat(parts) for parts in zip(*portions, strict=True))
    assert features.dtype == torch.float32
    wanted = calibration.shrink_covariances(statistics)
    for c in range(3):
        own = features[labels == c].double()
        covariance = wanted[c].diag() if diagonal else wanted[c]
        covariance = covariance + calibration.JITTER * torch.eye(WIDTH)
        size = covariance.diagonal().mean()
        assert (torch.cov(own.T) - covariance).abs().max() < 0.1 * size
        assert (own.mean(0) - statistics.means[c]).abs().max() < 0.06 * size.sqrt()


def test_a_singular_covariance_can_be_drawn_from():
    statistics = calibration.ClassStatistics(2, 3)
    statistics.add(torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 6.0, 9.0]]), torch.zeros(3).long())
    ((features, _),) = calibration.virtual_features(statistics, np.random.default_rng(0), 100, compat=True)
    torch.testing.assert_close(features[:, 1], 2 * features[:, 0], rtol=1e-4, atol=1e-4)


def test_calibration_mends_a_classifier_and_changes_nothing_else():
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(3).repeat(200)
    features = torch.randn(600, 3, generator=generator) * 0.3 + torch.eye(3)[labels]
    statistics = calibration.ClassStatistics(3, 3)
    statistics.add(features, labels)
    head = nn.Linear(3, 3)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3).roll(1, 0))
        head.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))
    before = [p.detach().clone() for p in head.parameters()]
    options = calibration.CalibrationOptions(calibration_lr=0.5, virtual_features=500)

    trained = calibration.calibrate(head, statistics, np.random.default_rng(0), options)
    accuracy = (trained(features).argmax(1) == labels).float().mean()
    assert (head(features).argmax(1) == labels).float().mean() < 0.5
    assert accuracy > 0.9
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
    again = calibration.calibrate(head, statistics, np.random.default_rng(0), options)
    assert torch.equal(trained.weight, again.weight)
    assert not any(p.requires_grad for p in trained.parameters())


def test_compat_makes_one_slow_pass():
    statistics = pool(samples())
    head = nn.Linear(WIDTH, CLASSES)
    compat = calibration.calibrate(
        head, statistics, np.random.default_rng(0), calibration.CalibrationOptions(ccvr_compat=True)
    )
    longer = calibration.CalibrationOptions(ccvr_compat=True, calibration_epochs=9, calibration_lr=0.5)
    assert torch.equal(compat.weight, calibration.calibrate(head, statistics, np.random.default_rng(0), longer).weight)


def test_bad_uploads_are_named_and_not_taken_in():
    clients = samples()
    for diagonal, column in ((False, 5), (True, 1)):
        own, server = (calibration.ClassStatistics(CLASSES, WIDTH, diagonal=diagonal) for _ in range(2))
        own.add(*clients[0])
        message = own.message()
        bad = message["scatters"].clone()
        bad[1, column] = -0.5  # the second feature's squared deviations; off the diagonal it would be sound
        for change, said in (
            ({"scatters": bad}, r"scatters .* must not be negative on the diagonal"),
            ({"means": message["means"][:1], "scatters": bad[:1]}, "1 means and scatters came for 2 classes"),
        ):
            with pytest.raises(ValueError, match=said):
                server.merge({**message, **change})
        assert server.counts.sum() == 0
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\), not 4"):
        server.add(torch.zeros(1, WIDTH), torch.tensor([4]))
    with pytest.raises(ValueError, match="at least one batch"):
        calibration.collect_statistics(nn.Identity(), [], CLASSES, calibration.CalibrationOptions())


# -- pooling -----------------------------------------------------------------------------------------------------------


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
