"""Tests of the identity of data: the same for every seed and partition, another for every change of the contents."""

import dataclasses

import numpy as np
import pytest
import torch

from fedkern.data import FederatedData, load
from fedkern.data.identity import identify_memory


def identity(name="digits", **settings):
    return load(name, identify=True, **settings).identity


@pytest.mark.sampled
@pytest.mark.parametrize(
    "settings",
    [{}, {"train_samples": 90}, {"train_samples": 90, "public_samples": 20}, {"public_samples": 20}],
    ids=lambda settings: " ".join(settings) or "all",
)
@pytest.mark.parametrize("name", ["digits", "colordigits", "segdigits"])
def test_seed_and_partition_change_nothing(name, settings):
    parts = identity(name, seed=0, clients=3, **settings)
    assert set(parts) == {"classes", "sizes", "names", "labels", "images"}
    assert parts == identity(name, seed=5, clients=2, partition="iid", **settings)


def test_nobody_pays_unasked():
    assert load("digits", train_samples=90).identity == {}


def arrays(change=None):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 6, 6), dtype=np.uint8), np.arange(24) % 2
    classes = ["a", "b"]
    if change == "image":
        images[3, 0, 0] ^= 1
    elif change == "swap":
        images[[0, 1]] = images[[1, 0]]
    elif change == "label":
        labels[4] = 1 - labels[4]
    elif change == "classes":
        classes = ["b", "a"]
    elif change == "fewer":
        images, labels = images[:-2], labels[:-2]
    return images, labels, classes


def make_data(change=None, order=slice(None), parts=3, test=None):
    images, labels, classes = arrays(change)
    images, labels = images[order], labels[order]
    clients = [(images[k::parts], labels[k::parts]) for k in range(parts)]
    tested = arrays(test)
    return FederatedData.from_arrays(clients, (tested[0][:8], tested[1][:8]), classes=classes)


def test_samples_in_memory_may_lie_with_any_client():
    assert identify_memory(make_data()) == identify_memory(make_data(order=slice(None, None, -1), parts=2))


@pytest.mark.parametrize(
    ("change", "parts"),
    [("image", {"images"}), ("swap", {"images"}), ("label", {"labels", "images"}), ("classes", {"classes"}),
     ("fewer", {"sizes", "labels", "images"})],
)  # fmt: skip
def test_what_changed_is_told(change, parts):
    before, two = identify_memory(make_data()), identify_memory(make_data(change))
    assert {name for name in before if before[name] != two[name]} == parts


@pytest.mark.parametrize("change", ["image", "label"])
def test_test_sets_count(change):
    before, two = identify_memory(make_data()), identify_memory(make_data(test=change))
    assert before["images"] != two["images"]


def test_names_texts_and_patients_count():
    data = make_data()
    split = data.clients[0]
    n = len(split)
    for field, value in {
        "ids": tuple(f"{k}.png" for k in range(n)), "texts": tuple(map(str, range(n))), "patients": torch.arange(n),
    }.items():  # fmt: skip
        named = dataclasses.replace(split, **{field: value})
        renamed = dataclasses.replace(data, clients=(named, *data.clients[1:]))
        assert identify_memory(renamed)["labels"] != identify_memory(data)["labels"], field
