"""Tests of the embedded captioned canvases: texts match images, and clients differ."""

import dataclasses

import numpy as np
import pytest
import torch

from fedkern.data import Split, load, lookup
from fedkern.data.sources.captions import CELL, CLASSES, INK, SIDE, WORDS, Glyph, Ground, add_noise, draw
from fedkern.data.sources.digits import read_digits
from fedkern.data.split import join_splits
from fedkern.errors import UserError

SMALL = {"test_samples": 20, "validation_samples": 10}


def captions(**settings):
    options = {**SMALL, **settings.pop("options", {})}
    return load("captions", train_samples=settings.pop("train_samples", 100), options=options, **settings)


@pytest.fixture(scope="module")
def data():
    return captions(train_samples=200)


def every_split(data):
    return [*data.clients, data.validation, *data.tests.values(), *data.client_tests]


def test_a_federation_of_images_and_texts(data):
    assert data.task.name == "retrieval"
    assert data.form.shape == (3, SIDE, SIDE)
    assert data.client_sizes == (48, 48, 47, 47, 10)  # the minority has its twentieth
    assert {name: len(split) for name, split in data.tests.items()} == {"": 20, "minority": 20, "unseen": 20}
    assert len(data.validation) == 10
    ids = [name for split in every_split(data) for name in split.ids]
    assert len(set(ids)) == len(ids) == len(data.image_ids)
    for split in every_split(data):
        assert len(split.texts) == len(split)
        assert split.masks.flatten(1).any(1).all()
    assert np.array_equal(data.statistics.sizes, data.client_sizes)
    again = captions(train_samples=200)
    for drawn, redrawn in zip(every_split(data), every_split(again), strict=True):
        assert torch.equal(drawn.images, redrawn.images)
        assert drawn.texts == redrawn.texts
    assert captions(train_samples=200, seed=1).clients[0].texts != data.clients[0].texts


def test_labels_of_colours_are_those_of_the_captions(data):
    """The canvases are the same, and their texts name the subject's colour first.

    The prompts use every client's words.
    """
    colours = captions(train_samples=200, options={"labels": "colour"})
    assert colours.classes == tuple(INK)
    prompts = lookup("captions").prompts
    for split, coloured in zip(every_split(data), every_split(colours), strict=True):
        assert torch.equal(split.images, coloured.images)
        assert split.texts == coloured.texts
        for text, label in zip(coloured.texts, coloured.labels, strict=True):
            places = {ink: min((text.find(w) for w in WORDS[ink] if w in text), default=len(text)) for ink in INK}
            assert min(places, key=places.get) == colours.classes[label]
    assert all({word for text in prompts[ink] for word in WORDS[ink] if word in text} == set(WORDS[ink]) for ink in INK)


def test_every_partition_has_tests_of_its_clients():
    """The test set has the client's own subjects, so that its loss is over the client's distribution."""
    data = captions(train_samples=200, partition="classes:2", options={"test_samples": 60})
    assert [len(split) for split in data.client_tests] == [60] * 5
    for own, test in zip(data.clients, data.client_tests, strict=True):
        assert set(test.labels.tolist()) == set(own.labels.tolist())


def test_a_caption_begins_with_the_label_and_names_what_is_shown(data):
    concept = {word: key for key, choices in WORDS.items() for word in choices if key in (*CLASSES, *INK)}
    for split in every_split(data):
        for image, label, mask, text in zip(split.images, split.labels, split.masks, split.texts, strict=True):
            named = [concept[word] for word in text.split() if word in concept]
            digits, inks = ([name for name in named if name in kind] for kind in (CLASSES, INK))
            assert digits[0] == CLASSES[label]
            assert 1 <= len(digits) == len(inks) <= 3
            cells = mask.unflatten(0, (2, CELL)).unflatten(2, (2, CELL)).any(3).any(1).flatten()
            assert int(cells.sum()) == len(digits)
            # The brightest pixel of every cell with a digit has the colour of a named ink.
            shown = {
                min(INK, key=lambda ink, pixel=pixel: float((pixel - torch.tensor(INK[ink])).abs().sum()))
                for cell in cells.nonzero().flatten().tolist()
                for pixel in [_brightest(image, cell)]
            }
            assert shown == set(inks)


def _brightest(image, cell):
    down, right = divmod(cell, 2)
    pixels = image[:, CELL * down : CELL * (down + 1), CELL * right : CELL * (right + 1)].flatten(1).float()
    return pixels[:, pixels.sum(0).argmax()]


@pytest.mark.parametrize(("cells", "said"), [((0, 2), "above"), ((3, 1), "below"), ((2, 3), "left"), ((1, 0), "right")])
def test_relations_are_those_of_the_picture(cells, said):
    from fedkern.data.sources.captions import _caption

    words = {key: choices[0] for key, choices in WORDS.items()}
    made = _caption(words, np.array([3, 7]), ["red", "blue"], np.array(cells))
    assert made == f"a red three {words[said]} a blue seven"
    corner = _caption(words, np.array([3, 7]), ["red", "blue"], np.array([0, 3]))
    assert corner == "a red three in the top left with a blue seven in the bottom right"


def test_a_canvas_shows_the_digit_where_the_mask_says():
    ground = Ground("plain", np.array([[10, 20, 30], [10, 20, 30]], dtype=np.uint8))
    image, mask = draw(ground, [Glyph(5, "white", 3, CELL)], np.random.default_rng(0))
    assert image.shape == (3, SIDE, SIDE)
    assert mask.any()
    assert not mask[:CELL].any()
    assert not mask[:, :CELL].any()
    assert len(np.unique(image[:, :CELL, :CELL].reshape(3, -1), axis=1).T) == 1
    assert image[:, mask].min() > image[:, :CELL, :CELL].max()


def test_the_minority_has_its_own_words_and_concepts():
    data = captions(train_samples=600, options={"minority": 0.2})
    third = {word for choices in WORDS.values() for word in choices[2].split()} - {
        word for choices in WORDS.values() for text in choices[:2] for word in text.split()
    }
    texts = [set(" ".join(split.texts).split()) for split in data.clients]
    assert texts[-1] & third
    assert all(not own & third for own in texts[:-1])
    shares = data.statistics.shares
    liked = np.argsort(shares[-1])[-3:]
    assert shares[-1, liked].sum() > 0.85
    assert shares[:-1, liked].sum(1).max() < 0.3


def test_a_noisy_minority_has_the_words_and_concepts_of_all():
    own, data = (captions(train_samples=600, options={"minority": 0.2, **noise}) for noise in ({}, NOISY))
    assert data.client_sizes == own.client_sizes
    assert set(data.tests) == set(own.tests)
    third = {word for choices in WORDS.values() for word in choices[2].split()} - {
        word for choices in WORDS.values() for text in choices[:2] for word in text.split()
    }
    assert not third & set(" ".join(text for split in every_split(data) for text in split.texts).split())
    assert data.statistics.shares[-1].max() < 0.5
    settled = captions(train_samples=600, options={"minority": 0})
    assert data.clients[0].texts == settled.clients[0].texts[: data.client_sizes[0]]  # nobody avoids a concept
    everybody = data.tests[""]
    noisy = [data.clients[-1].images, data.tests["minority"].images, data.client_tests[-1].images]
    noisy += [everybody.images[everybody.homes == 4], data.validation.images[data.validation.homes == 4]]
    clean = [split.images for split in (*data.clients[:-1], *data.client_tests[:-1], data.tests["unseen"])]
    clean += [everybody.images[everybody.homes != 4], data.validation.images[data.validation.homes != 4]]
    assert min(map(roughness, noisy)) > 1.5 * max(map(roughness, clean))


NOISY = {"minority_trait": "noise"}


def roughness(images):
    """Return the mean difference of neighbouring pixels."""
    return images.float().diff(dim=3).abs().mean()


def test_noise_is_even_and_bounded():
    image = np.full((3, 64, 64), 100, dtype=np.uint8)
    change = add_noise(image, 40, np.random.default_rng(0)).astype(int) - 100
    assert sorted(set(change.flatten().tolist())) == list(range(-40, 41))
    assert abs(change.mean()) < 1
    assert change.std() == pytest.approx(np.sqrt(81**2 / 12), rel=0.02)
    assert add_noise(image + 140, 40, np.random.default_rng(0)).max() == 255


def test_unseen_clients_speak_with_known_words():
    data = captions(train_samples=1500)
    known = set(" ".join(text for split in data.clients for text in split.texts).split())
    assert set(" ".join(data.tests["unseen"].texts).split()) <= known
    without = captions(options={"held_out": 0})
    assert set(without.tests) == {"", "minority"}


def test_digits_of_the_tests_are_not_those_of_the_training(monkeypatch):
    from fedkern.data.sources import captions as module

    rows = {}

    def remember(styles, count, subjects, pool, labels, rng, prefix, kind):
        rows[prefix.split("/")[0]] = set(pool.tolist())
        return real(styles, 2, None, pool, labels, rng, prefix, kind)

    real = module._canvases
    monkeypatch.setattr(module, "_canvases", remember)
    captions(clients=2, partition="iid", train_samples=4)
    assert rows["test"] == rows["unseen"]
    assert sum(len(rows[name]) for name in ("train", "validation", "test")) == len(read_digits()[1])
    assert not rows["train"] & rows["test"]
    assert not rows["train"] & rows["validation"]


def test_another_client_changes_no_earlier_one():
    settings = {"train_samples": 60, "options": {"minority": 0}}
    two, three = captions(clients=2, **settings), captions(clients=3, **settings)
    for longer, shorter in zip(two.clients, three.clients, strict=False):
        assert longer.texts[:20] == shorter.texts
        assert torch.equal(longer.images[:20], shorter.images)


@pytest.mark.parametrize("spec", ["iid", "stratified", "dirichlet:0.5", "classes:2"])
def test_other_partitions(spec):
    data = captions(partition=spec, train_samples=200, clients=5)
    assert sum(data.client_sizes) == 200
    assert set(data.tests) == {"", "unseen"}
    held = (data.statistics.counts > 0).sum(1)
    if spec == "classes:2":
        assert held.tolist() == [2] * 5
    if spec == "stratified":
        assert data.statistics.skew.max() < 0.05


def test_many_clients():
    data = captions(clients=120, train_samples=600, options={"test_samples": 2})
    assert len(data.clients) == 120
    assert min(data.client_sizes) >= 4


@pytest.mark.parametrize(("settings", "words"), [
    ({"clients": 30, "train_samples": 20}, "30 clients are more than 20 canvases"),
    ({"options": {"minority_trait": "noisy"}}, "minority_trait .*concepts"),
    ({"options": {"minority_trait": "noise", "minority": 0}}, "minority_trait = noise has no effect without a min"),
    ({"options": {"minority_trait": "noise"}, "partition": "iid"}, "give --partition attribute"),
    ({"options": {"minority_trait": "noise"}, "clients": 1}, "two clients or more"),
    ({"options": {"minority": 0.7}}, "minority .*must be in .0, 0.5."),
    ({"public_samples": 5}, "no public samples"),
    ({"options": {"cue_clients": 1}}, "cue_clients is for classification"),
    ({"correlation": 0.5}, "no colours to correlate"),
])  # fmt: skip
def test_mistakes(settings, words):
    with pytest.raises(UserError, match=words):
        captions(**settings)


def test_texts_follow_their_rows(data):
    split = data.clients[0]
    rows = torch.tensor([5, 2, 2])
    assert split.subset(rows).texts == tuple(split.texts[i] for i in (5, 2, 2))
    joined = join_splits(data.clients)
    assert joined.texts == tuple(text for split in data.clients for text in split.texts)
    assert join_splits([split, dataclasses.replace(split, texts=None)]).texts is None
    with pytest.raises(ValueError, match="texts: expected 48, one for every image, got 1"):
        Split(split.images, split.labels, texts=("one",))
