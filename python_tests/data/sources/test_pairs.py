"""Tests of images with captions: files, the embedded canvases, and data sets with the bits of fedkern's own."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, Dataset, Subset

import fedkern
from fedkern.data import Split, load, lookup
from fedkern.data.sharing.holdout import hold_out
from fedkern.data.sharing.partition import partition
from fedkern.data.sources import captions as module
from fedkern.data.sources.captions import CELL, CLASSES, INK, SIDE, WORDS, Glyph, Ground, add_noise, draw
from fedkern.data.sources.digits import read_digits
from fedkern.data.split import join_splits
from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.settings.config import RunConfig
from python_tests.data.image_sets import write_image
from python_tests.saved_network import same_network


def open_set(name, root, clients=2, partition="iid", **options):
    return load(name, root=root, clients=clients, partition=partition, options={"size": 16, **options})


def test_proportions_are_kept(tmp_path):
    for i in range(8):
        write_image(tmp_path / f"{i}.png", 200, size=(40, 20))
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    image = open_set("pairs", tmp_path).clients[0].images[0, 0]
    assert int(image[:4].max()) == int(image[12:].max()) == 0
    assert int(image[4:12].min()) == 200


def test_a_window_of_every_image(tmp_path):
    """Training images are stored whole.

    All other images have the centre, those of held-out clients and clients' own tests too.
    """
    lines = ["image,text,client,site"]
    ramp = np.broadcast_to(np.arange(24, dtype=np.uint8)[None, :], (24, 24))  # a pixel's value is its column
    for i in range(40):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,text number {i},{'ABC'[i % 3]},{'ABC'[i % 3]}")
    (tmp_path / "set.csv").write_text("\n".join(lines))
    options = {"size": 24, "crop": 16, "colour": "grey"}
    data = load("pairs", root=tmp_path, clients=3, partition="attribute", options=options)
    assert data.form.augment == "window"
    assert data.form.shape == (1, 16, 16)
    assert all(split.images.shape[2:] == (24, 24) for split in data.clients)
    holdout = hold_out(data, held_out=1, share=0.25, seed=0)
    for split in (data.validation, *data.tests.values(), holdout.tests["held_out"], *holdout.client_tests):
        assert split.images.shape[2:] == (16, 16)
        assert split.images[:, 0].eq(torch.arange(4, 20)).all()
    settings = {"data": "pairs", "data_root": str(tmp_path), "clients": 3, "partition": "attribute", "width": 8}
    context = RunContext(RunConfig.make("feddra", data_options=options, **settings), data)
    own = context.samples.of_client(0)
    rows = np.arange(len(own))
    columns = (own.take(rows) * data.form.std[0] + data.form.mean[0]).mul(255).round()[:, 0, 0, 0]
    assert columns.eq(4).all()
    drawn = own.take(np.zeros(500, dtype=np.int64), np.random.default_rng(0))
    assert drawn.shape[2:] == (16, 16)
    assert set((drawn * data.form.std[0] + data.form.mean[0]).mul(255).round()[:, 0, 0, 0].tolist()) == set(range(9))


def test_a_window_is_no_larger_than_the_image(refuses, tmp_path):
    write_image(tmp_path / "a.png", 1)
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match='data set "pairs": crop is 32, more than size, 16'):
        open_set("pairs", tmp_path, crop=32)
    config = RunConfig.make("feddra", data="captions", augment="window", train_samples=24)
    with refuses(r"--augment window draws the place of a window .* crop=N"):
        run(config, out=tmp_path / "run")


# images with a text beside them


@pytest.mark.parametrize("splits", [("",), ("train", "test"), ("train", "val", "test"), ("Training", "Test")])
@pytest.mark.parametrize("labels", [("",), ("cat", "dog")])
def test_folders_of_pairs(tmp_path, splits, labels):
    for split in splits:
        for label in labels:
            for i in range(10):
                path = tmp_path / split / label / f"{i}.png"
                write_image(path, i)
                path.with_suffix(".txt").write_text(f" {split} {label}\n {i} ")
    data = open_set("pairs", tmp_path)
    assert data.classes == (("any",) if labels == ("",) else labels)
    texts = []
    for split in every_split(data):
        for name, text, image in zip(split.ids, split.texts, split.images, strict=True):
            assert text.split() == [*name.split("/")[:-1], str(int(image.max()))]
            texts.append(name)
    assert len(set(texts)) == len(texts) == 10 * len(splits) * len(labels)
    held = {name.split("/")[0] for name in data.tests[""].ids}
    assert splits == ("",) or held == {splits[-1]}


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: (t / "3.txt").unlink(), r"3\.png has no text 3\.txt beside it"),
    (lambda t: (t / "3.txt").write_text(" \n"), r"3\.txt is empty"),
    (lambda t: (t / "3.txt").write_bytes(b"\xff\xfe\xff"), "not UTF-16"),
    (lambda t: [path.unlink() for path in t.glob("*.png")], "no image found"),
    (lambda t: (t / "a.csv").write_text("image,words\n1.png,x"), 'no column "text"'),
])  # fmt: skip
def test_wrong_pairs(tmp_path, change, words):
    for i in range(6):
        write_image(tmp_path / f"{i}.png", i)
        (tmp_path / f"{i}.txt").write_text("words")
    change(tmp_path)
    with pytest.raises(UserError, match=words):
        open_set("pairs", tmp_path)


def test_stratified_shares_are_equal():
    labels = np.repeat([0, 1, 2], [50, 7, 23])
    parts = partition("stratified", labels, 4, 0)
    assert torch.equal(torch.tensor(sorted(np.concatenate(parts))), torch.arange(80))
    counts = np.stack([np.bincount(labels[part], minlength=3) for part in parts])
    assert (counts.max(0) - counts.min(0) <= 1).all()
    assert {len(part) for part in parts} == {20}
    assert not np.array_equal(parts[0], partition("stratified", labels, 4, 1)[0])


# -- captions ----------------------------------------------------------------------------------------------------------


CAPTIONED = {"test_samples": 20, "validation_samples": 10}
THIRD = {word for choices in WORDS.values() for word in choices[2].split()} - {
    word for choices in WORDS.values() for text in choices[:2] for word in text.split()
}
"""Words of the minority alone."""


def captions(**settings):
    options = {**CAPTIONED, **settings.pop("options", {})}
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
    words = {key: choices[0] for key, choices in WORDS.items()}
    made = module._caption(words, np.array([3, 7]), ["red", "blue"], np.array(cells))
    assert made == f"a red three {words[said]} a blue seven"
    corner = module._caption(words, np.array([3, 7]), ["red", "blue"], np.array([0, 3]))
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


def test_positions_are_drawn_as_numpy_draws_them():
    shares, count = np.array([0.2, 0.0, 0.5, 0.3]), 1000
    expected = np.random.default_rng(0).choice(len(shares), count, p=shares)
    assert np.array_equal(module._choose(shares, count, np.random.default_rng(0)), expected)


def test_the_minority_has_its_own_words_and_concepts():
    data = captions(train_samples=600, options={"minority": 0.2})
    texts = [set(" ".join(split.texts).split()) for split in data.clients]
    assert texts[-1] & THIRD
    assert all(not own & THIRD for own in texts[:-1])
    shares = data.statistics.shares
    liked = np.argsort(shares[-1])[-3:]
    assert shares[-1, liked].sum() > 0.85
    assert shares[:-1, liked].sum(1).max() < 0.3


def test_a_noisy_minority_has_the_words_and_concepts_of_all():
    own, data = (captions(train_samples=600, options={"minority": 0.2, **noise}) for noise in ({}, NOISY))
    assert data.client_sizes == own.client_sizes
    assert set(data.tests) == set(own.tests)
    assert not THIRD & set(" ".join(text for split in every_split(data) for text in split.texts).split())
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


# -- dataset texts -----------------------------------------------------------------------------------------------------


NORMALIZE = (0.24, 0.22, 0.24), (0.25, 0.24, 0.25)  # of the named data
SMALL = {
    "width": 8, "rounds": 1, "local_steps": 3, "batch_size": 8, "progress": False, "pictures": False, "workers": 1,
}  # fmt: skip


class Pairs(Dataset):
    """Data set of images with texts: in its items where ``form`` is ``"pair"``, else in an attribute."""

    def __init__(self, split, form):
        self.split, self.form = split, form
        if form != "pair":
            self.texts = [*split.texts]

    def __len__(self):
        return len(self.split)

    def __getitem__(self, row):
        image, text = self.split.images[row], self.split.texts[row]
        items = {"pair": (image, text), "image": image, "class": (image, int(self.split.labels[row])),
                  "float": (image / 255 - 0.5) / 0.25}  # fmt: skip
        return items[self.form]


@pytest.fixture(scope="module")
def pairs():
    data = load("captions", clients=2, train_samples=60, options={"test_samples": 12, "held_out": 0, "minority": 0.4})
    empty_split = data.validation.subset(torch.tensor([], dtype=torch.int64))
    return dataclasses.replace(data, tests={"": data.tests[""]}, validation=empty_split, client_tests=())


def sets_of(pairs, form):
    clients = [Pairs(split, form) for split in pairs.clients]
    return {"data": clients, "test": Pairs(pairs.tests[""], form)}


@pytest.mark.parametrize(("method", "form"), [
    ("feddra", "pair"), ("feddra", "class"), ("fedavg", "image"), ("scaffold", "pair"), ("local", "pair"),
])  # fmt: skip
def test_a_run_has_the_bits_of_named_data(method, form, pairs, tmp_path):
    options = {"options": {"rho": 0.1, "alignment_steps": 2, "stage_schedule": "sequential"}}
    options = options if method == "feddra" else {}
    sets = sets_of(pairs, form)
    run = fedkern.simulate(method, **sets, normalize=NORMALIZE, out=tmp_path / "sets", **SMALL, **options)
    expected = fedkern.simulate(method, data=pairs, out=tmp_path / "named", **SMALL, **options)
    assert run.metrics == expected.metrics
    assert same_network(run.out, expected.out)
    again = fedkern.load(run.out, **sets, normalize=NORMALIZE)
    assert again.evaluate(sets["test"])["i2t_r1"] == run.metrics["i2t_r1"]


def test_subsets_and_concatenations_have_texts(pairs, tmp_path):
    parts = [Pairs(split, "image") for split in pairs.clients]
    halves = {"a": Subset(parts[0], [*range(0, 20)]), "b": ConcatDataset([Subset(parts[0], [20, 21]), parts[1]])}
    tests = {name: Pairs(pairs.tests[""].subset(torch.arange(k, 12, 2)), "float") for k, name in enumerate(halves)}
    floats = {name: Subset(Pairs(pairs.clients[0], "float"), [*range(k, 8 + k)]) for k, name in enumerate(halves)}
    run = fedkern.simulate("fedavg", data=halves, test=Pairs(pairs.tests[""], "image"), out=tmp_path / "a", **SMALL)
    assert run.metrics["gallery"] == 12
    run = fedkern.simulate("fedavg", data=floats, test=tests, out=tmp_path / "b", **SMALL)
    assert run.metrics["gallery"] == 12


def test_an_image_with_several_texts_is_one_image(pairs, tmp_path):
    split = pairs.tests[""].subset(torch.tensor([0, 0, 1, 2]))
    test = Pairs(dataclasses.replace(split, texts=("one", "two", "three", "four")), "pair")
    out = tmp_path / "run"
    run = fedkern.simulate("fedavg", **{**sets_of(pairs, "pair"), "test": test}, out=out, **SMALL)
    assert run.metrics["gallery"] == 4
    assert run.metrics["i2t_r1"] * 3 == pytest.approx(round(run.metrics["i2t_r1"] * 3))  # three images ask


def lengths(model, batch):
    images, texts = batch
    return cross_entropy(model(images / 255), torch.tensor([len(text) % 2 for text in texts]))


def test_a_loss_and_a_network_of_ones_own_leave_texts_alone(pairs, tmp_path):
    small = {name: value for name, value in SMALL.items() if name != "width"}
    small |= {"model": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))}
    own = fedkern.simulate("fedavg", **sets_of(pairs, "pair"), batch_loss=lengths, out=tmp_path / "own", **small)
    assert own.metrics.keys() == {"loss"}
    classes = fedkern.simulate("fedavg", **sets_of(pairs, "class"), **{**small, "model": "cnn"}, out=tmp_path / "cnn")
    assert "accuracy" in classes.metrics


@pytest.mark.parametrize(("change", "sentence"), [
    ({"model": "resnet8"}, "^model has no effect on images with texts: leave it out, or give classes as whole numbers"),
    ({"method": "fedgid"}, "fedgid is for classification.*retrieval"),
    ({"test": "class"}, r"Item 0 of the test set cannot be read \(.*it has no text: give items \(image, text\)"),
    ({"partition": "dirichlet:0.5"}, "needs classes, and images with texts have none"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(change, sentence, pairs, refuses, tmp_path):
    sets = sets_of(pairs, "pair")
    if "test" in change:
        sets["test"] = Pairs(pairs.tests[""], "class")
        del sets["test"].texts
    if "partition" in change:
        sets["data"] = sets["data"][0]
    settings = {name: value for name, value in change.items() if name not in ("method", "test")}
    with refuses(sentence):
        fedkern.simulate(change.get("method", "feddra"), **sets, **settings, **SMALL, out=tmp_path / "run")
