"""A federation so small that a round takes milliseconds, and its settings."""

import dataclasses

import numpy as np
import pytest
import torch

from fedkern.data import FederatedData, PartitionStatistics, Split
from fedkern.data.forms import ImageForm
from fedkern.methods import METHODS
from fedkern.settings.config import RunConfig
from fedkern.tasks import CLASSIFICATION
from python_tests.smallest import SETTINGS

CLASSES = 3
SIDE = 8
FORM = ImageForm((3, SIDE, SIDE), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


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
        name="tiny", classes=classes, clients=clients, validation=split(8, seed + 3, masked), tests=tests, form=FORM,
        statistics=PartitionStatistics.of([c.labels.numpy() for c in clients], classes, "iid"),
    )  # fmt: skip


@pytest.fixture
def make_data():
    return federation


@pytest.fixture(scope="module")
def played_once(tmp_path_factory):
    """Return the folder of a run that several tests of a module read, and play the run if its name is new."""
    folders = {}

    def get(name, play):
        if name not in folders:
            folder = tmp_path_factory.mktemp("played") / name
            play(folder)
            folders[name] = folder
        return folders[name]

    return get


@pytest.fixture
def commit():
    """Return a function that commits checkpoint ``number`` with new states of some clients."""

    def commit(checkpoints, number, clients=()):
        for k in clients:
            checkpoints.write_client(k, number, {"x": torch.full((3,), float(number))})
        checkpoints.commit(round=number, plan=number, server={"n": number}, info={"n": number})

    return commit


WORDS = ("red", "green", "blue", "dark", "bright", "small", "large", "round", "flat", "left", "right", "odd")


def pairs(samples, seed, concepts=CLASSES):
    """Return images of one coloured square each, with texts that name its colour and place."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, concepts, samples))
    images = torch.from_numpy(rng.integers(0, 60, (samples, 3, PAIR_SIDE, PAIR_SIDE)).astype(np.uint8))
    texts = []
    for i, label in enumerate(labels.tolist()):
        x, y = rng.integers(0, PAIR_SIDE - 5, 2)
        images[i, label % 3, y : y + 6, x : x + 6] = 120 + 20 * int(rng.integers(0, 6))
        side = WORDS[9 if x < PAIR_SIDE / 2 - 3 else 10]
        texts.append(f"a {WORDS[label % 3]} square, {side} {WORDS[3 + y % 2]} {WORDS[5 + label % 7]}")
    return Split(images, labels, texts=tuple(texts))


PAIR_SIDE = 16


def pair_federation(sizes=(20, 13, 9), *, seed=0):
    clients = tuple(pairs(n, seed + 10 + k) for k, n in enumerate(sizes))
    classes = tuple("abc")
    return FederatedData(
        name="tiny-pairs", classes=classes, clients=clients, validation=pairs(8, seed + 3),
        tests={"": pairs(16, seed + 1)}, form=ImageForm((3, PAIR_SIDE, PAIR_SIDE), (0.2,) * 3, (0.2,) * 3),
        statistics=PartitionStatistics.of([c.labels.numpy() for c in clients], classes, "iid"),
    )  # fmt: skip


@pytest.fixture
def make_pairs():
    return pair_federation


@pytest.fixture
def make_public():
    def make(data, samples=6, seed=5):
        return dataclasses.replace(data, public=split(samples, seed))

    return make


@pytest.fixture
def make_config():
    def make(method="fedavg", **settings):
        plain = {"width": 2, "rounds": 2, "local_epochs": 1, "batch_size": 8, "clients": 3, "threads": 1, "grad_cam": 0}
        return RunConfig.make(method, **{**plain, **settings})  # None takes one of these away

    return make


@pytest.fixture
def make_small(make_data, make_pairs, make_public, make_config):
    """Return the settings of a short run of any method, and data that it learns."""

    def make(method, rounds=1, two_tests=True, **more):
        plan = {"rounds": None if METHODS[method].one_shot else rounds, "grad_cam": 0}
        config = make_config(method, **{**plan, **SETTINGS.get(method, {}), **more})
        if METHODS[method].serves(CLASSIFICATION):
            return config, make_public(make_data(two_tests=two_tests), samples=12)
        return config, make_pairs()

    return make
