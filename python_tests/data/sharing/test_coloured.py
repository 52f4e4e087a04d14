"""Tests of coloured backgrounds, cues and backdoors: exact masks, ties to class and client, and patches."""

import dataclasses

import numpy as np
import pytest
import torch

from fedkern.data import FederatedData, Split, load
from fedkern.data.sharing.coloured import INK_THRESHOLD, PALETTES, class_colours, colourise, paint, random_colours
from fedkern.data.sharing.cue import SHAPES, add_cues, draw_shapes, shape_masks
from fedkern.errors import UserError
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import kept_data, load_data

WHITE, CONTRAST = PALETTES["white"], PALETTES["contrast"]


def backgrounds(split: Split) -> np.ndarray:
    """Return the background colour of every image, uint8 [n, 3], after checking that it is one flat colour."""
    colours = []
    for image, mask in zip(split.images, split.masks, strict=True):
        pixels = image[:, ~mask]
        assert (pixels == pixels[:, :1]).all()
        colours.append(pixels[:, 0].numpy())
    return np.stack(colours)


def tied_share(split: Split, own: np.ndarray) -> float:
    return float((backgrounds(split) == own[split.labels.numpy()]).all(axis=1).mean())


def same(a: Split, b: Split) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.masks, b.masks)


@pytest.fixture(scope="module")
def digits() -> FederatedData:
    return load("colordigits", seed=5)


def test_defaults(digits: FederatedData) -> None:
    assert digits.form.shape == (3, 32, 32)
    assert digits.client_sizes == (240,) * 5
    assert (len(digits.validation), len(digits.tests["id"]), len(digits.tests["ood"])) == (247, 350, 350)
    assert digits.form.augment == "none"
    assert digits.tests["id"].ids == digits.tests["ood"].ids
    assert torch.equal(digits.tests["id"].masks, digits.tests["ood"].masks)


def test_the_statistics_have_the_colours_of_the_images(digits: FederatedData) -> None:
    statistics = digits.statistics
    assert statistics.colours.shape == (5, 10, 3)
    assert statistics.tied == 0.7
    for split, own in zip(digits.clients, statistics.colours, strict=True):
        assert 0.6 < tied_share(split, own) < 0.8
    left = statistics.without(1, 240)
    np.testing.assert_array_equal(left.colours, statistics.colours[[0, 2, 3, 4]])


@pytest.mark.parametrize("ink", PALETTES)
def test_colourise_is_exact(ink: str) -> None:
    grey = torch.randint(0, 256, (40, 1, 14, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    palette = PALETTES[ink]
    colours = random_colours(40, palette, np.random.default_rng(0))
    images, masks = colourise(grey, colours, palette)
    assert torch.equal(masks, grey[:, 0] > INK_THRESHOLD)
    ground = torch.from_numpy(colours)[:, :, None, None].expand_as(images)
    outside = ~masks[:, None].expand_as(images)
    assert torch.equal(images[outside], ground[outside])
    opacity = grey.double() / 255
    bright = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64) @ torch.from_numpy(colours).double().T / 255
    white = torch.where(bright <= 0.5, 255.0, 0.0) if palette.contrast else torch.full((40,), 255.0)
    assert len(set(white.tolist())) == (2 if palette.contrast else 1)
    blended = opacity * white[:, None, None, None] + (1 - opacity) * ground.double()
    assert (images.double() - blended)[~outside].abs().max() <= 0.5
    # Ink always shows: every object pixel differs from the background.
    assert (images.int() - ground.int()).abs().sum(1)[masks].min() > 0


def test_masks_and_shapes_are_the_digits(digits: FederatedData) -> None:
    grey = load("digits", clients=1, partition="iid")
    by_name = dict(zip(grey.clients[0].ids, grey.clients[0].images[:, 0], strict=True))
    for split in digits.clients:
        for name, mask in zip(split.ids, split.masks, strict=True):
            assert torch.equal(mask, by_name[name] > INK_THRESHOLD)
    covered = torch.cat([split.masks for split in digits.clients]).flatten(1).double().mean(1)
    assert covered.min() > 0.1
    assert covered.max() < 0.75


@pytest.mark.sampled(2)
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.8, 1.0])
def test_correlation_ties_colour_to_class_and_client(correlation: float) -> None:
    data = load("colordigits", seed=2, correlation=correlation)
    shares = [tied_share(split, class_colours(2, k, 10, WHITE)) for k, split in enumerate(data.clients)]
    # Standard deviation of a share over 240 samples is at most 0.033.
    assert all(abs(share - correlation) < 0.13 for share in shares)
    # A client's colours mean nothing to the others.
    assert all(tied_share(split, class_colours(2, (k + 1) % 5, 10, WHITE)) == 0 for k, split in enumerate(data.clients))


def test_id_test_and_validation_share_the_clients_colours_and_ood_does_not() -> None:
    data = load("colordigits", seed=2, correlation=1.0)
    maps = [class_colours(2, k, 10, WHITE) for k in range(5)]
    for split, expected in ((data.tests["id"], 1.0), (data.validation, 1.0), (data.tests["ood"], 0.0)):
        per_client = [tied_share(split, own) for own in maps]
        assert sum(per_client) == pytest.approx(expected)
        if expected:
            assert all(abs(share - 0.2) < 0.03 for share in per_client)


def test_ood_colours_are_uniform_and_tell_nothing() -> None:
    data = load("colordigits", seed=0, correlation=1.0)
    colours = backgrounds(data.tests["ood"]).astype(float)
    assert colours.max() <= WHITE.brightest
    np.testing.assert_allclose(colours.mean(axis=0), WHITE.brightest / 2, atol=12)
    labels = data.tests["ood"].labels.numpy()
    per_class = np.stack([colours[labels == label].mean(axis=0) for label in range(10)])
    assert np.abs(per_class - WHITE.brightest / 2).max() < 40


def test_a_clients_colours_are_apart() -> None:
    for client in range(50):
        own = class_colours(1, client, 10, WHITE).astype(float)
        distance = np.linalg.norm(own[:, None] - own[None], axis=2) + 1e9 * np.eye(10)
        assert distance.min() > 25
        assert own.max() <= WHITE.brightest


def test_adding_a_client_changes_no_others_colours() -> None:
    three, six = (load("colordigits", seed=9, clients=clients, correlation=1.0) for clients in (3, 6))
    for k in range(3):
        assert tied_share(three.clients[k], class_colours(9, k, 10, WHITE)) == 1
        assert tied_share(six.clients[k], class_colours(9, k, 10, WHITE)) == 1


def test_the_seed_reproduces(digits: FederatedData) -> None:
    again, reseeded = load("colordigits", seed=5), load("colordigits", seed=6)
    for name in ("id", "ood"):
        assert same(digits.tests[name], again.tests[name])
        assert not torch.equal(digits.tests[name].images, reseeded.tests[name].images)
        # The fixed split: another seed paints the same digits.
        assert digits.tests[name].ids == reseeded.tests[name].ids
    assert digits.validation.ids == reseeded.validation.ids
    assert same(digits.validation, again.validation)
    assert all(same(a, b) for a, b in zip(digits.clients, again.clients, strict=True))
    assert any(a.ids != b.ids for a, b in zip(digits.clients, reseeded.clients, strict=True))


def test_iid_clients_share_one_colour_map() -> None:
    data = load("colordigits", seed=4, partition="iid", correlation=1.0)
    shared = class_colours(4, -1, 10, WHITE)
    assert all(tied_share(split, shared) == 1 for split in (*data.clients, data.tests["id"], data.validation))


def test_label_skew_keeps_the_clients_colours_and_steers_the_id_test() -> None:
    data = load("colordigits", seed=4, clients=10, partition="classes:1", correlation=1.0)
    held = [int(split.labels[0]) for split in data.clients]
    colours = backgrounds(data.tests["id"])
    for client, label in enumerate(held):
        rows = data.tests["id"].labels.numpy() == label
        assert (colours[rows] == class_colours(4, client, 10, WHITE)[label]).all()


@pytest.mark.parametrize(("name", "layout"), [("colormnist", "MNIST/raw"), ("colorfashion", "FashionMNIST/raw")])
def test_idx_sets(tmp_path, write_idx, name: str, layout: str) -> None:
    content = write_idx(tmp_path / layout)
    data = load(name, root=tmp_path, clients=4, correlation=1.0)
    assert data.form.shape == (3, 28, 28)
    assert sum(data.client_sizes) == 100
    test = torch.from_numpy(content["t10k-images-idx3-ubyte"])
    assert torch.equal(data.tests["ood"].masks, test > INK_THRESHOLD)
    assert tied_share(data.clients[2], class_colours(0, 2, 10, CONTRAST)) == 1


@pytest.mark.parametrize("correlation", [-0.1, 1.1, float("nan")])
def test_correlation_outside_its_range_or_without_colours(correlation: float) -> None:
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]"):
        load("colordigits", correlation=correlation)
    with pytest.raises(UserError, match='"digits" has no colours'):
        load("digits", correlation=0.5)


def test_box_masks_hide_the_shape_in_training_images_only(digits: FederatedData) -> None:
    boxed = load("colordigits", seed=5, options={"mask": "box"})
    for split, exact in zip(boxed.clients, digits.clients, strict=True):
        assert torch.equal(split.images, exact.images)
        for box, mask in zip(split.masks, exact.masks, strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            expected = torch.zeros_like(mask)
            expected[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
            assert torch.equal(box, expected)
    assert same(boxed.tests["ood"], digits.tests["ood"])
    assert same(boxed.validation, digits.validation)


def test_ink_by_contrast_uses_every_colour_and_both_inks() -> None:
    data = load("digits", clients=1)
    split = paint(data, CONTRAST, 0.0, "exact", 3).tests["ood"]
    colours = backgrounds(split)
    assert colours.max() > 245
    strongest = [
        float(image[:, mask].float().mean(0).sub(c.mean()).abs().max())
        for image, mask, c in zip(split.images, split.masks, colours, strict=True)
    ]
    assert min(strongest) > 80
    lighter = [
        bool(image[:, mask].float().mean() > c.mean())
        for image, mask, c in zip(split.images, split.masks, colours, strict=True)
    ]
    assert 0.3 < float(np.mean(lighter)) < 0.7


# -- backdoor ----------------------------------------------------------------------------------------------------------


CLIENTS = {"clients": 3, "partition": "iid", "train_samples": 90}


def test_only_the_attackers_clients_and_the_test_change():
    plain = load("digits", **CLIENTS)
    data = load("digits", options={"backdoor_clients": 1, "backdoor_target": 3, "backdoor_size": 5}, **CLIENTS)
    before, after = plain.clients[0], data.clients[0]
    patched = (after.images != before.images).flatten(1).any(1)
    assert int(patched.sum()) == round(len(before) / 2)
    assert bool((after.labels[patched] == 3).all())
    assert torch.equal(after.labels[~patched], before.labels[~patched])
    changed = (after.images != before.images).any(0).any(0).nonzero()
    assert (changed.amin(0).tolist(), changed.amax(0).tolist()) == ([26, 26], [30, 30])
    assert bool((after.images[patched][..., 26:31, 26:31] == 255).all())
    for k in (1, 2):
        assert torch.equal(plain.clients[k].images, data.clients[k].images)
    assert torch.equal(plain.validation.images, data.validation.images)
    assert set(data.tests) == {"", "backdoor"}
    clean, attacked = data.tests[""], data.tests["backdoor"]
    assert torch.equal(clean.images, plain.tests[""].images)
    victims = clean.labels != 3
    assert len(attacked) == int(victims.sum())
    assert bool((attacked.labels == 3).all())
    assert torch.equal(attacked.images[..., :26, :], clean.images[victims][..., :26, :])
    assert bool((attacked.images[..., 26:31, 26:31] == 255).all())


def test_the_table_counts_what_is_trained_on():
    data = load("digits", options={"backdoor_clients": 2}, **CLIENTS)
    for counts, split in zip(data.statistics.counts, data.clients, strict=True):
        assert counts.tolist() == torch.bincount(split.labels, minlength=10).tolist()
    assert (data.statistics.counts[:2, 0] >= 15).all()


def test_what_is_held_out_is_clean():
    """Clients' own test sets keep their labels, and the first client that trains is backdoored."""
    wanted = {"seed": 0, "client_test": 0.2, "held_out_client": "0", **CLIENTS}
    plain, attacked = (
        RunConfig.make("fedavg", data="digits", data_options=options, **wanted)
        for options in ({}, {"backdoor_clients": 1, "backdoor_target": 3})
    )
    before, after = (kept_data(config, load_data(config)) for config in (plain, attacked))
    assert set(after.tests) == {"", "held_out", "backdoor", "held_out_backdoor"}
    for before_split, after_split in zip(
        (*before.client_tests, before.tests["held_out"], before.clients[1]),
        (*after.client_tests, after.tests["held_out"], after.clients[1]),
        strict=True,
    ):
        assert torch.equal(before_split.images, after_split.images)
        assert torch.equal(before_split.labels, after_split.labels)
    clean, poisoned = before.clients[0], after.clients[0]
    changed = (poisoned.images != clean.images).flatten(1).any(1)
    assert int(changed.sum()) == round(len(clean) / 2)
    assert after.statistics.counts[0].tolist() == torch.bincount(poisoned.labels, minlength=10).tolist()


def test_a_backdoor_is_for_classification():
    config = RunConfig.make("fedavg", data="segdigits", model="unet", data_options={"backdoor_clients": 1})
    with pytest.raises(UserError, match='backdoor_clients is for classification, and data set "segdigits" is for segm'):
        kept_data(config, load_data(config))


def test_wrong_backdoors_are_one_sentence():
    for options, said in (
        ({"backdoor_clients": 4}, "backdoor_clients is 4, but the data are shared out among 3"),
        ({"backdoor_clients": 1, "backdoor_target": 10}, "backdoor_target is 10, but .* classes 0 to 9"),
        ({"backdoor_clients": 1, "backdoor_size": 32}, "backdoor_size is 32, but the images"),
        ({"backdoor_clients": 1, "backdoor_size": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            load("digits", options=options, **CLIENTS)


# -- cue ---------------------------------------------------------------------------------------------------------------


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
