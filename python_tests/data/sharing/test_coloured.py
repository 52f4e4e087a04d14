"""Tests of coloured backgrounds: exact masks, the tie between colour, class and client, and effects of the seed."""

import numpy as np
import pytest
import torch

from fedkern.data import FederatedData, Split, load
from fedkern.data.sharing.coloured import INK_THRESHOLD, PALETTES, class_colours, colourise, paint, random_colours
from fedkern.errors import UserError
from fedkern.streams import stream

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


def test_id_and_ood_show_the_same_digits(digits: FederatedData) -> None:
    assert digits.tests["id"].ids == digits.tests["ood"].ids
    assert torch.equal(digits.tests["id"].masks, digits.tests["ood"].masks)


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
def test_correlation_outside_its_range(correlation: float) -> None:
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]"):
        load("colordigits", correlation=correlation)


def test_correlation_without_colours() -> None:
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


def test_random_colours_use_their_own_stream() -> None:
    # The generator handed in is the only source: nothing global.
    a, b = (random_colours(100, WHITE, stream(1, "x", client=2)) for _ in range(2))
    np.testing.assert_array_equal(a, b)
