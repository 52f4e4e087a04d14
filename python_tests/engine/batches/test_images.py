"""Samples of clients and test sets without a run: batches against plain PyTorch, streams, caches, order."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fedkern.data import Split, augment, normalise
from fedkern.data.forms import ImageForm
from fedkern.data.images import transforms
from fedkern.engine.batches import images as reader_of_images
from fedkern.engine.batches.images import Images
from fedkern.engine.batches.reader import batch_plan
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.models.pretrained.vocabulary import Vocabulary
from fedkern.tasks import RETRIEVAL, SEGMENTATION

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
NONE = np.array([], dtype=np.int64)
COUNT, SIDE = 12, 8


@pytest.fixture
def split(make_data):
    """Return images with labels and masks."""
    return make_data((COUNT,)).clients[0]


@pytest.fixture
def sparse(split):
    """Return the same images, two without an object, and one that is nothing but an object."""
    masks = split.masks.clone()
    masks[[0, 5]] = False
    masks[3] = True
    return dataclasses.replace(split, masks=masks)


HAVING = [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]  # an object


def client(split, kind="none", *, cache=False, sides=None, **more):
    form = ImageForm((3, *(sides or split.images.shape[2:])), MEAN, STD)
    return Images(split, form, CPU, augment=kind, cache=cache, **more)


def held_out(split, **more):
    return Images(split, ImageForm(split.images.shape[1:], MEAN, STD), CPU, **more)


def plain(images):
    """Normalise in fp64, as torchvision does."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return (images.double() / 255 - mean) / std


def close(found, expected):
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found.double(), expected, rtol=0, atol=2e-6)


def stream():
    return np.random.default_rng(7)


# -- a client's batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
def test_a_batch_is_what_plain_pytorch_makes_of_its_rows(split, cache):
    data = client(split, cache=cache)
    assert len(data) == COUNT
    for rows in (np.array([7, 0, 7, 11]), np.arange(COUNT)[::-2], NONE):  # after the first a cache has the images
        batch = data.batch(rows)
        close(batch.inputs, plain(split.images[rows.copy()]))
        assert torch.equal(batch.targets, split.labels[rows.copy()])
        assert batch.indices is rows
        assert not batch.fresh
    close(data.pixels.take(None), plain(split.images))


def test_a_cache_normalises_all_images_once_and_late(split, monkeypatch):
    counts = []

    def count_normalise(images, mean, std):
        counts.append(len(images))
        return normalise(images, mean, std)

    monkeypatch.setattr(transforms, "normalise", count_normalise)
    for cache, expected in ((True, [COUNT]), (False, [2, 1, 2])):
        counts.clear()
        data = client(split, cache=cache)
        assert counts == []
        for rows in ([3, 1], [0], [3, 1]):
            data.batch(np.array(rows))
        assert counts == expected


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", ["none", "crop-flip"])
@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
def test_batches_picked_at_once_are_those_picked_one_by_one(split, kind, cache, at_once, monkeypatch):
    order = np.random.default_rng(0).permutation(COUNT)
    plan = [order[:4], order[4:7], order[7:]]  # the last one is the largest

    def epoch():
        rng = None if kind == "none" else stream()
        return list(client(split, kind, cache=cache).make_batches(plan, rng=rng))

    singly = epoch()
    monkeypatch.setitem(reader_of_images.PICKED_BYTES, "cpu", at_once * 5 * 3 * SIDE * SIDE * 4)
    together = epoch()
    assert len(singly) == len(together) == len(plan)
    for a, b, indices in zip(singly, together, plan, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)
        assert a.inputs.stride() == b.inputs.stride()
        assert a.indices is b.indices is indices
        assert a.fresh is b.fresh is (kind != "none")
    for batches, shared in ((singly, False), (together, at_once > 1 and kind == "none")):
        left, second = (batch.inputs.untyped_storage().data_ptr() for batch in batches[:2])
        assert (left == second) is shared


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", ["crop-flip", "nico"])
def test_augmentation_draws_from_the_given_stream_alone(split, kind, cache):
    data, given, own = client(split, kind, cache=cache), stream(), stream()
    for rows in ([3, 1, 8], [5]):
        batch = data.batch(np.array(rows), rng=given)
        images = normalise(split.images[rows], MEAN, STD, channels_last=True)
        assert torch.equal(batch.inputs, augment(images, kind, own))
        assert not torch.equal(batch.inputs, images)
        assert batch.fresh
    assert given.random() == own.random()
    close(data.batch(np.array([3, 1])).inputs, plain(split.images[[3, 1]]))  # the client's own images stay


@pytest.mark.parametrize("cache", [False, True])
def test_a_network_sees_a_window(split, cache):
    rows, sides = np.array([4, 9, 0]), (4, 6)
    images = normalise(split.images[rows], MEAN, STD, channels_last=True)
    centre = images[:, :, 2:6, 1:7]
    data, given, own = client(split, "crop", cache=cache, sides=sides), stream(), stream()
    assert torch.equal(data.batch(rows).inputs, centre)
    anywhere = augment(transforms.window(images, sides, own), "crop", own)  # the window is drawn first
    assert torch.equal(data.batch(rows, rng=given).inputs, anywhere)
    data = client(split, "none", cache=cache, sides=sides)
    assert torch.equal(data.batch(rows, rng=given).inputs, centre)  # without augmentation nothing is drawn
    assert given.random() == own.random()


def test_every_augmented_pass_draws_anew(split):
    data, given, own = client(split, "crop-flip"), stream(), stream()
    for _ in range(2):
        for batch in data.batches(5, augment=True, rng=given):
            assert batch.fresh
            assert torch.equal(batch.inputs, data.take(batch.indices, own))
    assert not any(batch.fresh for batch in data.batches(5, rng=given))
    assert not any(batch.fresh for batch in client(split).batches(5, augment=True, rng=given))
    assert given.random() == own.random()
    with pytest.raises(ValueError, match="rng: expected a generator"):
        next(data.batches(5, augment=True))


def test_tokens_are_those_of_the_rows_up_to_the_longest(split):
    texts = ["red", "red green blue", "blue", "red green"] * 3
    tokens = Vocabulary(("red", "green", "blue")).tokenize(texts, 10)
    pairs = dataclasses.replace(split, texts=tuple(texts), task=RETRIEVAL)
    data = client(pairs, tokens=tokens)
    for batch, length in ((data.batch(np.array([3, 0])), 3), (data.batch(np.array([1])), 4), (data.batch(NONE), 1)):
        assert torch.equal(batch.targets.ids, tokens.ids[batch.indices, :length])
        assert torch.equal(batch.targets.mask, tokens.mask[batch.indices, :length])
    for batch in data.batches(5):
        assert torch.equal(batch.targets.ids, tokens.ids[batch.indices, : batch.targets.ids.shape[1]])
    found = list(held_out(pairs, tokens=tokens, size=11).batches(even=True))
    assert [len(batch.inputs) for batch in found] == [6, 6]  # no pair is left alone
    close(torch.cat([batch.inputs for batch in found]), plain(split.images))
    assert torch.equal(torch.cat([batch.targets.ids for batch in found]), tokens.ids)


# -- backgrounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
def test_a_bank_holds_the_images_with_an_object_and_erases_it(sparse, cache):
    data = client(sparse, cache=cache)
    bank, masks = data.backgrounds, sparse.masks[HAVING][:, None]
    expected = torch.where(masks, 0.0, plain(sparse.images[HAVING]))
    assert len(bank) == len(HAVING)
    assert bank.labels.tolist() == sparse.labels[HAVING].tolist()
    assert not bank.augmented
    for rows in ([9, 0, 9], [2], []):
        close(bank.take(np.array(rows, dtype=np.int64), stream()), expected[rows])
    close(bank.take(None), expected)
    assert torch.equal(bank.take(None)[2, :, 0, 0], torch.zeros(3))  # to the bit
    assert data.backgrounds is bank


def test_an_augmented_bank_moves_what_is_left_after_erasing(sparse):
    bank = client(sparse, "crop-flip").backgrounds
    rows = np.array([0, 4])
    assert bank.augmented
    assert torch.equal(bank.take(rows, stream()), augment(bank.take(rows), "crop-flip", stream()))


def test_clients_without_a_detected_object_and_without_masks(split):
    data = client(dataclasses.replace(split, masks=torch.zeros_like(split.masks)))
    bank = data.backgrounds
    assert len(bank) == 0
    assert bank.take(None).shape == bank.take(NONE, stream()).shape == (0, 3, SIDE, SIDE)
    data = client(dataclasses.replace(split, masks=None))
    with pytest.raises(ValueError, match="masks: expected bool"):
        _ = data.backgrounds


# -- test sets -----------------------------------------------------------------------------------------------------


def test_pixels_bound_the_batches_of_a_segmentation(split, monkeypatch):
    pixels = dataclasses.replace(split, labels=torch.zeros(COUNT, SIDE, SIDE, dtype=torch.int64), task=SEGMENTATION)
    for pixels_at_once, batch in ((SIDE * SIDE * 3 + 1, 3), (SIDE * SIDE * 300, 7), (1, 1)):
        monkeypatch.setattr("fedkern.tasks.segmentation.PIXELS", pixels_at_once)
        assert held_out(pixels, size=7).size == batch
        assert held_out(split, size=7).size == 7


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (5, [5]), (7, [4, 3]), (40, [4, 4, 4])])
def test_the_first_images_with_their_masks(sparse, count, sizes):
    found = list(held_out(sparse, size=4).masked_batches(count))
    assert [len(images) for images, _ in found] == sizes
    for start, (images, masks) in zip(np.cumsum([0, *sizes]), found, strict=False):
        close(images, plain(sparse.images[start : start + len(images)]))
        assert torch.equal(masks, sparse.masks[start : start + len(images)])


def test_answers_are_kept_inside_the_block_that_keeps(split):
    data = held_out(split)
    assert (data.keep, data.kept, data.predictions) == (None, [], None)
    data.record(split.labels)
    assert torch.equal(data.predictions, split.labels)
    with data.keeping():
        data.keep("the run's")
        data.keep("a client's", 2)
    assert data.keep is None
    assert data.kept == [(None, "the run's"), (2, "a client's")]
    with data.keeping():
        data.keep("later")
    assert data.kept == [(None, "later")]


# -- reader ------------------------------------------------------------------------------------------------------------


FORM = ImageForm((3, 8, 8), (0.5,) * 3, (0.2,) * 3)

EDGES = list(itertools.product([1, 2, 5, 6, 7, 8, 9, 13], [1, 2, 4, 40]))


def some(count, seed=0):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, 8, 8)).astype(np.uint8))
    return Split(images, torch.from_numpy(rng.integers(0, 3, count)))


@pytest.mark.parametrize(("samples", "size"), list(itertools.product([1, 2, 3, 4, 5, 7, 8, 9, 33], [1, 2, 4, 8, 40])))
def test_batches_cover_the_client_and_never_hold_one_sample_by_accident(samples, size):
    plan = batch_plan(samples, size, np.random.default_rng(0))
    assert sorted(np.concatenate(plan).tolist()) == list(range(samples))
    assert all(len(batch) <= size + 1 for batch in plan)
    if size > 1 and samples > 1:
        assert min(map(len, plan)) > 1
    if samples <= size:
        assert len(plan) == 1


def test_an_epoch_is_the_streams_permutation_in_batches():
    plan = batch_plan(13, 4, np.random.default_rng(7))
    assert [len(rows) for rows in plan] == [4, 4, 5]
    assert np.concatenate(plan).tolist() == np.random.default_rng(7).permutation(13).tolist()


@pytest.mark.parametrize(("count", "size"), EDGES)
def test_a_rest_of_one_joins_the_batch_before_it(count, size):
    data = Images(some(count), FORM, torch.device("cpu"), size=size)
    found = list(data.batches())
    plain = [min(size, count - start) for start in range(0, count, size)]
    if len(plain) > 1 and plain[-1] == 1 and size > 1:
        plain[-2:] = [size + 1]
    assert [len(batch.inputs) for batch in found] == plain
    assert np.concatenate([batch.indices for batch in found]).tolist() == list(range(count))
    assert torch.equal(torch.cat([batch.targets for batch in found]), data.labels)
    assert torch.equal(torch.cat([batch.inputs for batch in found]), data.pixels.take(None))


def test_an_evaluation_without_running_statistics_leaves_no_image_alone(make_data, make_config, tmp_path):
    data = dataclasses.replace(make_data(two_tests=False), tests={"": some(501)}, validation=some(501, 1))
    config = make_config(model="mlp", buffers="drop", rounds=1, grad_cam=0)
    assert 0 <= run(config, out=tmp_path, data=data)["metrics"]["accuracy"] <= 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("The test set has", {"tests": {"": some(1)}}),
        ("The out-of-distribution test set has", {"tests": {"id": some(4), "ood": some(1)}}),
        ("The validation set has", {"validation": some(1)}),
        ("The test set of client 1 has", {"client_tests": (some(4), some(1), some(4))}),
    ],
)
def test_a_single_image_without_statistics_is_said_in_one_sentence(name, changes, make_data, make_config, tmp_path):
    data = dataclasses.replace(make_data(), **changes)
    with pytest.raises(UserError, match=f"^{name} a single image, .* --buffers average"):
        run(make_config(model="mlp", buffers="drop", rounds=1), out=tmp_path / "none", data=data)
    # With running statistics, and where a map has several positions, one image is enough.
    for changed in ({"model": "mlp"}, {"model": "cnn", "buffers": "drop"}):
        run(make_config(rounds=1, grad_cam=0, **changed), out=tmp_path / changed["model"], data=data)
