"""A federation so small that a round takes milliseconds, and its settings."""

import dataclasses

import numpy as np
import pytest
import torch

from fedkern.data import FederatedData, PartitionStatistics, Split
from fedkern.engine import RunConfig

CLASSES = 3
SIDE = 8


def split(samples, seed, masked=True, channels=3):
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, CLASSES, samples))
    images = torch.from_numpy(rng.integers(0, 256, (samples, channels, SIDE, SIDE)).astype(np.uint8))
    masks = torch.zeros(samples, SIDE, SIDE, dtype=torch.bool)
    masks[:, 2:6, 2:6] = True
    images[:, :, 2:6, 2:6] = (labels * 100 + 20)[:, None, None, None].to(torch.uint8)
    return Split(images, labels, masks if masked else None)


def federation(sizes=(20, 13, 9), *, masked=True, two_tests=True, seed=0):
    clients = tuple(split(n, seed + 10 + k, masked) for k, n in enumerate(sizes))
    names = ("id", "ood") if two_tests else ("",)
    tests = {name: split(16, seed + 1 + i, masked) for i, name in enumerate(names)}
    classes = tuple("abc")
    return FederatedData(
        name="tiny",
        classes=classes,
        clients=clients,
        validation=split(8, seed + 3, masked),
        tests=tests,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        augment="none",
        statistics=PartitionStatistics.of([c.labels.numpy() for c in clients], classes, "iid"),
    )


@pytest.fixture
def make_data():
    return federation


@pytest.fixture
def make_public():
    def make(data, samples=6, seed=5):
        return dataclasses.replace(data, public=split(samples, seed))

    return make


@pytest.fixture
def make_config():
    def make(method="fedavg", **settings):
        plain = {"width": 2, "rounds": 2, "local_epochs": 1, "batch_size": 4, "clients": 3, "threads": 1, "grad_cam": 4}
        return RunConfig.make(method, **{**plain, **settings})  # None takes one of these away

    return make
