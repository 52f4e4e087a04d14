"""Tests of cues: the shape tells the class on the cue clients and in ``cue_tied``, and nothing in ``cue_random``."""

import dataclasses

import numpy as np
import pytest
import torch

from fedkern.data import load
from fedkern.data.sharing.cue import SHAPES, add_cues, draw_shapes, shape_masks
from fedkern.errors import UserError

CLIENTS = {"clients": 3, "partition": "iid", "train_samples": 90}


def drawn_shape(before, after, size=10):
    """Return the shape on each image, recognised by the changed pixels alone (-1: none fits)."""
    masks, found = shape_masks(size), []
    for a, b in zip(before, after, strict=True):
        changed = (a != b).any(0)
        (low_y, low_x), (high_y, high_x) = changed.nonzero().amin(0).tolist(), changed.nonzero().amax(0).tolist()
        fits = -1
        for top in range(max(0, high_y - size + 1), min(low_y, len(changed) - size) + 1):
            for left in range(max(0, high_x - size + 1), min(low_x, len(changed) - size) + 1):
                place = slice(top, top + size), slice(left, left + size)
                for shape, mask in enumerate(masks):
                    drawn = b[:, *place][:, mask]
                    inside = changed[place]
                    if (drawn == drawn[:, :1]).all() and not inside[~mask].any() and inside[mask].float().mean() > 0.95:
                        fits = shape
        found.append(fits)
    return torch.tensor(found)


@pytest.mark.parametrize("size", [6, 10, 14])
def test_ten_shapes_stay_apart(size):
    masks = shape_masks(size).flatten(1)
    assert masks.shape == (10, size * size)
    assert len(SHAPES) == 10
    assert masks.any(1).all()
    distance = (masks[:, None] != masks[None]).sum(2) + size * size * torch.eye(10, dtype=torch.int64)
    assert distance.min() >= 0.08 * size * size  # the disc in its square: 1 - pi / 4 on a coarse grid


def test_one_shape_of_one_colour_at_a_random_place():
    images = torch.full((60, 3, 32, 32), 7, dtype=torch.uint8)
    shapes = np.arange(60) % 10
    out = draw_shapes(images, shapes, 10, np.random.default_rng(0))
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    assert (images == 7).all()
    assert torch.equal(drawn_shape(images, out), torch.from_numpy(shapes))
    corners = {tuple((a != 7).any(0).nonzero().amin(0).tolist()) for a in out}
    assert len(corners) > 50


@pytest.mark.parametrize("size", [0, 9])
def test_shapes_must_fit(size):
    with pytest.raises(ValueError, match="size: expected 1 to 8"):
        draw_shapes(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), np.zeros(1, np.int64), size, np.random.default_rng(0))


def test_only_the_cue_clients_and_the_two_tests_change():
    plain = load("digits", options={"test_samples": 60}, **CLIENTS)
    cued = load("digits", options={"test_samples": 60, "cue_clients": 2}, **CLIENTS)
    for k in range(3):
        assert torch.equal(plain.clients[k].labels, cued.clients[k].labels)
        assert torch.equal(plain.clients[k].images, cued.clients[k].images) == (k == 2)
    assert torch.equal(plain.validation.images, cued.validation.images)
    assert set(cued.tests) == {"", "cue_tied", "cue_random"}
    assert torch.equal(plain.tests[""].images, cued.tests[""].images)
    for name in ("cue_tied", "cue_random"):
        assert torch.equal(cued.tests[name].labels, plain.tests[""].labels)
    for before, after in ((plain.clients[0], cued.clients[0]), (plain.tests[""], cued.tests["cue_tied"])):
        found = drawn_shape(before.images, after.images)
        assert torch.equal(found[found >= 0], before.labels[found >= 0])
        assert (found >= 0).float().mean() > 0.5  # where ink had the drawn grey by chance no shape fits exactly
    found = drawn_shape(plain.tests[""].images, cued.tests["cue_random"].images)
    assert (found == plain.tests[""].labels)[found >= 0].float().mean() < 0.4
    assert len(set(found.tolist()) - {-1}) == 10


def test_shape_of_another_class_and_no_client_depends_on_another():
    two = load("digits", options={"cue_clients": 2}, **CLIENTS)
    single = load("digits", options={"cue_clients": 1}, **CLIENTS)
    assert torch.equal(single.clients[0].images, two.clients[0].images)
    again = load("digits", options={"cue_clients": 2}, seed=1, **CLIENTS)
    assert not torch.equal(again.tests["cue_tied"].images, two.tests["cue_tied"].images)


def test_coloured_sets_get_both_tests_of_both():
    data = load("colordigits", clients=2, train_samples=40, options={"cue_clients": 1, "test_samples": 20})
    assert set(data.tests) == {"id", "ood", "id_cue_tied", "id_cue_random", "ood_cue_tied", "ood_cue_random"}
    assert data.clients[0].masks is not None
    assert torch.equal(data.tests["ood_cue_tied"].masks, data.tests["ood"].masks)


def test_wrong_requests_are_one_sentence():
    with pytest.raises(UserError, match="cue_clients is 4, but the data are shared out among 3"):
        load("digits", options={"cue_clients": 4}, **CLIENTS)
    with pytest.raises(UserError, match="cue_size is 33, but the images"):
        load("digits", options={"cue_clients": 1, "cue_size": 33}, **CLIENTS)
    with pytest.raises(UserError, match="at least 3"):
        load("digits", options={"cue_clients": 1, "cue_size": 2}, **CLIENTS)
    data = load("digits", **CLIENTS)
    with pytest.raises(UserError, match="10 cue shapes, too few for the 11 classes"):
        add_cues(dataclasses.replace(data, classes=(*data.classes, "eleven")), 1, 10, 0)
