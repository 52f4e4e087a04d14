"""FedCGS: a classifier from pooled statistics, equal to that of all features in one place.

Nothing else changes.
"""

import pytest
import torch
from safetensors.torch import load_file

from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods.baselines.fedcgs import FeatureStatistics

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
