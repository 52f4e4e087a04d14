"""Tests of the public split: images that everybody may see and no client holds."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import fedkern
from fedkern.data import load
from fedkern.errors import UserError


def ids(split):
    return set(split.ids)


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.5", "classes:2"])
def test_it_is_disjoint_from_every_client_and_they_share_out_the_rest(partition):
    data = load("digits", partition=partition, public_samples=200)
    held = [ids(client) for client in data.clients]
    assert len(data.public) == len(ids(data.public)) == 200
    assert not ids(data.public) & set().union(*held)
    assert len(ids(data.public) | set().union(*held)) == 1200
    assert not ids(data.public) & (ids(data.validation) | ids(data.tests[""]))


def test_beside_a_subset_the_clients_keep_their_data():
    without, beside = (load("digits", train_samples=500, public_samples=n) for n in (0, 300))
    assert without.public is None
    for a, b in zip(without.clients, beside.clients, strict=True):
        assert a.ids == b.ids
        assert torch.equal(a.images, b.images)
    again = load("digits", train_samples=500, public_samples=300)
    assert beside.public.ids == again.public.ids
    assert load("digits", train_samples=500, public_samples=300, seed=1).public.ids != again.public.ids


def test_a_coloured_one_shows_the_clients_colours():
    data = load("colordigits", public_samples=150, correlation=1.0)
    seen = {tuple(image[:, 0, 0].tolist()) for client in data.clients for image in client.images}
    assert {tuple(image[:, 0, 0].tolist()) for image in data.public.images} <= seen
    assert data.public.masks is not None


@pytest.mark.parametrize(("train", "public"), [(None, 1200), (1000, 201), (None, 5000)])
def test_more_than_there_are_is_one_sentence(train, public):
    with pytest.raises(UserError, match=r"has 1200 training samples, so it cannot give \d+"):
        load("digits", train_samples=train, public_samples=public)


class Images(Dataset):
    """Images ``[3, 16, 16]`` of three classes, of which ``give`` makes items."""

    def __init__(self, seed, count, give=lambda image, label: (image, label)):
        draw = np.random.default_rng(seed)
        self.targets, self.give = draw.integers(0, 3, count), give
        self.images = torch.from_numpy(
            (draw.integers(0, 60, (count, 3, 16, 16)) + 60 * self.targets[:, None, None, None]).astype(np.uint8)
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.give(self.images[row], int(self.targets[row]))


def play(method, out, give=None):
    how = {"fediod": {"mode": "public", "rounds": 1}, "fedlpfm": {"pretrain_epochs": 1, "rounds": 1}}.get(method, {})
    sets = {"data": [Images(k, 24) for k in range(2)], "test": Images(2, 12)}
    sets |= {} if give is None else {"public": Images(3, 16, give)}
    settings = {"model": "cnn", "width": 4, "batch_size": 8, "local_epochs": 1, "workers": 1}
    return fedkern.simulate(method, **sets, **settings, **how, out=out, progress=False, pictures=False)


@pytest.mark.parametrize("give", [
    lambda image, label: image,
    lambda image, label: {"image": image},
    lambda image, label: (image, label + 40),  # of other data
], ids=["image", "dict", "others"])  # fmt: skip
@pytest.mark.parametrize("method", ["feddf", "fediod"])
def test_public_items_need_no_classes(method, give, tmp_path):
    expected = play(method, tmp_path / "labelled", lambda image, label: (image, label))
    assert play(method, tmp_path / "unlabelled", give).metrics == expected.metrics
    with pytest.raises(UserError, match=r"learns from public images with classes .* give items \(image, class\) in"):
        play("fedlpfm", tmp_path / "taught", give)
    assert not (tmp_path / "taught").exists()


@pytest.mark.parametrize("method", ["feddf", "fediod", "fedlpfm"])
def test_public_items_are_asked_for(method, refuses, tmp_path):
    with refuses("public images.*public=DATASET"):
        play(method, tmp_path / "run")
