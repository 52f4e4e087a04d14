"""Tests of images with several captions: no held-out set shows an image that a client trains on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import load
from fedkern.data.sharing.holdout import hold_out
from fedkern.data.sharing.partition import partition
from fedkern.data.split import join_splits
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.errors import UserError
from fedkern.methods import FedDRA
from fedkern.methods.protocol import OUTSIDE
from fedkern.settings.config import RunConfig
from fedkern.streams import stream

PARTITIONS = ["iid", "stratified", "dirichlet:0.5:min=2", "dirichlet:1:plain", "classes:1"]


def write(root, images=40, texts=5, client=lambda i, j: "ABC"[i % 3]):
    """Write captions, those of one image far from each other in the file."""
    lines = ["image,text,label,client"]
    for j in range(texts):
        for i in range(images):
            Image.new("RGB", (8, 8), (i, i, i)).save(root / f"{i}.png")
            lines.append(f"{i}.png,caption {i} {j},{'xyz'[i % 3]},{client(i, j)}")
    path = root / "captions.csv"
    path.write_text("\n".join(lines))
    return path


def open_set(path, **settings):
    return load("pairs", root=path, **{"clients": 3, "partition": "iid", "options": {"size": 8}, **settings})


def assert_apart(*splits):
    names = [set(split.ids) for split in splits]
    assert sum(map(len, names)) == len(set.union(*names))


@pytest.mark.parametrize("spec", PARTITIONS)
def test_a_client_has_all_texts_of_its_images(tmp_path, spec):
    data = open_set(write(tmp_path), partition=spec)
    assert_apart(*data.clients, data.validation, data.tests[""])
    assert len(data.tests[""]) == len(set(data.tests[""].texts)) == 5 * len(set(data.tests[""].ids)) == 45
    assert sum(data.client_sizes) == 5 * sum(len(set(split.ids)) for split in data.clients)
    assert int(data.statistics.counts.sum()) == sum(data.client_sizes)
    for split in data.clients:
        for name, text, image in zip(split.ids, split.texts, split.images, strict=True):
            assert text.split()[1] == name.removesuffix(".png") == str(int(image.max()))


def test_an_image_is_one_however_it_is_written(tmp_path):
    path = write(tmp_path)
    lines = path.read_text().splitlines()
    lines[41:81] = [f"./{line}" for line in lines[41:81]]
    path.write_text("\n".join(lines))
    data = open_set(path)
    assert_apart(*data.clients, data.validation, data.tests[""])
    assert len(data.image_ids) == 40


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_what_is_set_aside_is_not_trained_on(tmp_path, share):
    data = open_set(write(tmp_path))
    holdout = hold_out(data, held_out=1, share=share, seed=0)
    assert_apart(*holdout.clients, holdout.tests["held_out"], *holdout.client_tests)
    sizes = [len(split) for split in (*holdout.clients, holdout.tests["held_out"], *holdout.client_tests)]
    assert sum(sizes) == sum(data.client_sizes)
    for split in holdout.client_tests:
        assert len(split) == 10
        assert len(set(split.ids)) == 2


def test_the_public_images_are_nobodys(tmp_path):
    data = open_set(write(tmp_path), train_samples=60, public_samples=23)
    assert_apart(*data.clients, data.public)
    assert sum(data.client_sizes) == 60
    assert len(data.public) == 23


def test_an_image_of_two_clients_cannot_be_held_out(tmp_path):
    path = write(tmp_path, client=lambda i, j: "ABC"[i % 3])
    data = open_set(path, partition="attribute")
    shared = join_splits([data.clients[0], data.clients[2].subset(torch.arange(2))])
    data = replace(data, clients=(shared, *data.clients[1:]))
    with pytest.raises(
        UserError, match=r"Client 2 \(C\) cannot be held out: \d+ of its images \(\d+\.png\) belong to client 0 \(A\)"
    ):
        hold_out(data, held_out=2, share=0, seed=0)
    assert set(hold_out(data, held_out=1, share=0, seed=0).tests) == {"", "held_out"}


def robust(data, **options):
    config = RunConfig.make("feddra", data="pairs", clients=len(data.clients), width=4, options=options)
    context = RunContext(config, data)
    return FedDRA(FedDRA.Options.parse(options)), [Client(context, k, {}) for k in range(len(data.clients))]


@pytest.mark.parametrize("loss_share", [0.1, 0.3, 0.5])
def test_losses_are_taken_on_images_that_are_not_trained_on(tmp_path, loss_share):
    data = open_set(write(tmp_path))
    method, clients = robust(data, loss_share=loss_share)
    for client, split in zip(clients, data.clients, strict=True):
        method.check(client)
        kept, judged = method.rows(client)
        assert np.array_equal(np.sort(np.concatenate([kept, judged])), np.arange(len(split)))
        assert_apart(split.subset(torch.from_numpy(kept)), split.subset(torch.from_numpy(judged)))
        assert method.judged(len(split)) <= len(judged) < method.judged(len(split)) + 5
        images = len(judged) // 5
        for turn in range(5):  # as many different images as there are, one after another
            assert len({split.ids[row] for row in judged[turn * images : (turn + 1) * images]}) == images
    on_training = robust(data, loss_share=loss_share, loss_split="train")
    assert np.array_equal(on_training[0].rows(on_training[1][0])[0], np.arange(len(data.clients[0])))


def test_too_few_images_are_named(tmp_path):
    data = open_set(write(tmp_path, images=6, texts=20, client=lambda i, j: ""), clients=4)
    method, clients = robust(data)
    with pytest.raises(UserError, match="Client 0 has 20 samples of 1 images or patients, too few to keep some"):
        method.check(clients[0])
    with pytest.raises(UserError, match="Client 0 has 1 different images, too few for a test set"):
        hold_out(data, held_out=None, share=0.2, seed=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("spec", [*PARTITIONS, "attribute"])
def test_distinct_images_are_drawn_as_ever(tmp_path, spec, seed):
    """Every draw is over the rows themselves, as in recorded runs."""
    path = write(tmp_path, images=120, texts=1)
    data = open_set(path, partition=spec, seed=seed)
    full = open_set(path, clients=1, seed=seed).clients[0]
    labels = full.labels.numpy()
    groups = np.array([int(name.removesuffix(".png")) % 3 for name in full.ids])
    parts = partition(spec, labels, 3, seed, class_count=3, groups=groups)
    assert [split.ids for split in data.clients] == [tuple(full.ids[row] for row in part) for part in parts]
    holdout = hold_out(data, held_out=None, share=0.2, seed=seed)
    for k, split in enumerate(data.clients):
        order = stream(seed, "client-test", client=k).permutation(len(split))
        count = max(2, round(0.2 * len(split)))
        assert holdout.client_tests[k].ids == tuple(split.ids[row] for row in np.sort(order[:count]))
        assert holdout.clients[k].ids == tuple(split.ids[row] for row in np.sort(order[count:]))
    chosen = stream(seed, "train-samples").choice(len(full), size=50, replace=False)
    public = stream(seed, "public-samples").choice(np.setdiff1d(np.arange(len(full)), chosen), size=9, replace=False)
    fewer = open_set(path, clients=1, seed=seed, train_samples=50, public_samples=9)
    assert fewer.clients[0].ids == tuple(full.ids[row] for row in np.sort(chosen))
    assert fewer.public.ids == tuple(full.ids[row] for row in np.sort(public))
    method, clients = robust(data)
    for client, split in zip(clients, data.clients, strict=True):
        assert client.groups is None
        order = client.rng("held-out", OUTSIDE).permutation(len(split))
        kept, judged = method.rows(client)
        count = max(2, round(0.1 * len(split)))
        assert np.array_equal(kept, np.sort(order[count:]))
        assert np.array_equal(judged, order[:count])
