"""Classifier calibration: exact pooling, the released code's formula, shrinkage, virtual features, the trained head."""

import numpy as np
import pytest
import torch
from torch import nn

from fedkern.methods.common.calibration import (
    JITTER,
    CalibrationOptions,
    ClassStatistics,
    calibrate,
    collect_statistics,
    shrink_covariances,
    virtual_features,
)

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
    server = ClassStatistics(CLASSES, WIDTH, **kind)
    for features, labels in clients:
        own = ClassStatistics(CLASSES, WIDTH, diagonal=server.diagonal)
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
    pool = ClassStatistics(CLASSES, WIDTH)
    for x, y in clients:
        pool.add(x, y)
    torch.testing.assert_close(pool.covariances()[0], torch.cov(features[labels == 0].T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("diagonal", [False, True])
def test_what_is_sent(diagonal):
    features, labels = samples()[0]
    statistics = ClassStatistics(CLASSES, WIDTH, diagonal=diagonal)
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
            statistics = ClassStatistics(2, WIDTH, diagonal=diagonal)
            statistics.add(torch.randn(n, WIDTH, generator=generator) * scales, torch.zeros(n, dtype=torch.int64))
            statistics.add(torch.ones(1, WIDTH), torch.ones(1, dtype=torch.int64))
            exact, pulled = statistics.covariances()[0], shrink_covariances(statistics)
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
    portions = list(virtual_features(statistics, np.random.default_rng(0), 8000))
    assert len(portions) > 1
    for x, y in portions:
        assert torch.bincount(y, minlength=CLASSES).tolist() == [len(x) // 3] * 3 + [0]
    features, labels = (torch.cat(parts) for parts in zip(*portions, strict=True))
    assert features.dtype == torch.float32
    wanted = shrink_covariances(statistics)
    for c in range(3):
        own = features[labels == c].double()
        covariance = wanted[c].diag() if diagonal else wanted[c]
        covariance = covariance + JITTER * torch.eye(WIDTH)
        size = covariance.diagonal().mean()
        assert (torch.cov(own.T) - covariance).abs().max() < 0.1 * size
        assert (own.mean(0) - statistics.means[c]).abs().max() < 0.06 * size.sqrt()


def test_a_singular_covariance_can_be_drawn_from():
    statistics = ClassStatistics(2, 3)
    statistics.add(torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 6.0, 9.0]]), torch.zeros(3).long())
    ((features, _),) = virtual_features(statistics, np.random.default_rng(0), 100, compat=True)
    torch.testing.assert_close(features[:, 1], 2 * features[:, 0], rtol=1e-4, atol=1e-4)


def test_calibration_mends_a_classifier_and_changes_nothing_else():
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(3).repeat(200)
    features = torch.randn(600, 3, generator=generator) * 0.3 + torch.eye(3)[labels]
    statistics = ClassStatistics(3, 3)
    statistics.add(features, labels)
    head = nn.Linear(3, 3)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3).roll(1, 0))
        head.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))
    before = [p.detach().clone() for p in head.parameters()]
    options = CalibrationOptions(calibration_lr=0.5, virtual_features=500)

    trained = calibrate(head, statistics, np.random.default_rng(0), options)
    accuracy = (trained(features).argmax(1) == labels).float().mean()
    assert (head(features).argmax(1) == labels).float().mean() < 0.5
    assert accuracy > 0.9
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
    again = calibrate(head, statistics, np.random.default_rng(0), options)
    assert torch.equal(trained.weight, again.weight)
    assert not any(p.requires_grad for p in trained.parameters())


def test_compat_makes_one_slow_pass():
    statistics = pool(samples())
    head = nn.Linear(WIDTH, CLASSES)
    compat = calibrate(head, statistics, np.random.default_rng(0), CalibrationOptions(ccvr_compat=True))
    longer = CalibrationOptions(ccvr_compat=True, calibration_epochs=9, calibration_lr=0.5)
    assert torch.equal(compat.weight, calibrate(head, statistics, np.random.default_rng(0), longer).weight)


def test_bad_uploads_are_named_and_not_taken_in():
    clients = samples()
    for diagonal, column in ((False, 5), (True, 1)):
        own, server = (ClassStatistics(CLASSES, WIDTH, diagonal=diagonal) for _ in range(2))
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
        collect_statistics(nn.Identity(), [], CLASSES, CalibrationOptions())
