"""Tests of the embedded segmentation set, and of partitions of images with a class per pixel."""

import numpy as np
import pytest
import torch

from fedkern.data import load
from fedkern.data.sharing.groups import share_cases, training_cases
from fedkern.data.sources.digits import read_digits
from fedkern.data.sources.segdigits import CONTRAST, SCALE, read_segdigits
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.settings.config import RunConfig


@pytest.fixture(scope="module")
def digits_set():
    return read_segdigits()


def test_every_image_holds_its_digit(digits_set):
    images, labels = digits_set
    _, digits = read_digits()
    assert images.dtype == torch.uint8
    assert images.shape == (1797, 3, 32, 32)
    assert torch.equal(labels.flatten(1).amax(1), digits + 1)
    inks = labels > 0
    assert torch.equal(labels, inks * (digits + 1)[:, None, None])
    share = inks.double().mean((1, 2))
    assert share.min() > 0.04
    assert share.max() < 0.5
    # Ink is brighter than the ground of its image, and not of one colour.
    bright = images.double().mean(1)
    ink, ground = ((bright * part).sum((1, 2)) / part.sum((1, 2)) for part in (inks, ~inks))
    assert (ink - ground).mean() > 0.7 * CONTRAST
    assert (ink > ground).all()
    assert images.double().std((2, 3)).min() > 5


def test_it_is_the_same_everywhere(digits_set):
    images, labels = digits_set
    x = images.double() / 255
    np.testing.assert_allclose(x.mean((0, 2, 3)), SCALE[0], atol=5e-4)
    np.testing.assert_allclose(x.std((0, 2, 3)), SCALE[1], atol=5e-4)
    assert int(images.long().sum()) == 540699730
    assert int((labels > 0).sum()) == 411025


def test_clients_differ_in_their_digits_and_not_in_their_background():
    data = load("segdigits", clients=4, partition="dirichlet:0.1", train_samples=400)
    assert data.task.name == "segmentation"
    assert data.classes[:2] == ("background", "0")
    assert (data.statistics.counts[:, 0] == 0).all()
    pixels = torch.stack([torch.bincount(client.labels.flatten(), minlength=11) for client in data.clients]).double()
    share = pixels / pixels.sum(1, keepdim=True)
    assert share[:, 0].std() < 0.05
    weights = pixels / pixels.sum(0)
    assert weights[:, 1:].amax(0).median() > 0.6
    for client, counts in zip(data.clients, data.statistics.counts, strict=True):
        assert torch.equal(torch.bincount(client.labels.flatten(1).amax(1), minlength=11), torch.from_numpy(counts))


def test_a_partition_by_classes_leaves_the_background_out():
    data = load("segdigits", clients=5, partition="classes:2", train_samples=200)
    assert sorted(np.concatenate([np.flatnonzero(row) for row in data.statistics.counts])) == list(range(1, 11))


def test_a_run_needs_no_more_than_its_name(tmp_path):
    config = RunConfig.make("fedavg", data="segdigits")
    assert (config.model, config.optimizer) == ("unet-small", "adamw")
    small = config.replace(rounds=1, local_epochs=1, width=2, train_samples=60, clients=2, threads=1)
    small = small.replace(data_options={"test_samples": 20}, partition="iid")
    metrics = run(small, out=tmp_path)["metrics"]
    assert {"dice", "iou", "loss"} <= set(metrics)


@pytest.mark.parametrize("method", ["oneshot-fedavg", "ensemble", "local", "feddf", "fediod"])
def test_every_method_takes_a_segmentation_network(method):
    assert RunConfig.make(method, data="segdigits").model == "unet-small"
    assert RunConfig.make(method, data="segmentation").model == "unet"


# cases


def test_a_case_is_shared_out_as_one():
    cases = np.array([5, 5, 5, 2, 2, 9, 9, 9, 9, 4])
    labels = np.array([0, 1, 0, 2, 1, 0, 0, 0, 0, 2])
    seen = []

    def share(kinds, begins, sizes):
        seen.append((kinds.tolist(), begins.tolist(), sizes.tolist()))
        return [np.array([0, 2]), np.array([1, 3])]

    assert [rows.tolist() for rows in share_cases(cases, labels, share)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    # Case 2 counts as class 1 (as many as of 2), case 5 as 1 in spite of two slices without an object, case 9 as 0.
    assert seen == [([1, 2, 1, 0], [3, 9, 0, 5], [2, 1, 3, 4])]


def test_public_images_share_no_case_with_the_clients():
    cases = np.repeat(np.arange(12), 5)
    kept, shown = training_cases("x", cases, None, 7, seed=1)
    assert len(shown) == 7
    assert len(kept) == 50  # two cases are touched
    assert not set(cases[kept]) & set(cases[shown])
    fewer, shown_again = training_cases("x", cases, 13, 7, seed=1)
    assert len(fewer) == 13
    assert len(set(cases[fewer])) == 3
    assert np.array_equal(shown, shown_again)
    assert set(fewer) <= set(kept)
    everything, unused = training_cases("x", cases, None, 0, seed=1)
    assert np.array_equal(everything, np.arange(60))
    assert len(unused) == 0
    with pytest.raises(UserError, match=r"60 training images of 12 cases, so it cannot give 51 beside 7 public ones"):
        training_cases("x", cases, 51, 7, seed=1)
    with pytest.raises(UserError, match="cannot train on the others beside 57"):
        training_cases("x", cases, None, 57, seed=1)
