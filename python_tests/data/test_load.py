"""Tests of the embedded digits, checks of `load` on every data set, their identity, and the public split."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import fedkern
from fedkern.data import DATASETS, FederatedData, Split, load
from fedkern.data.identity import identify_memory
from fedkern.data.sources.digits import read_digits, small_digits
from fedkern.errors import UserError


@pytest.fixture(scope="module")
def digits() -> FederatedData:
    return load("digits", seed=0)


def test_a_run_needs_no_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = Path(fedkern.__file__).parent.rglob("*.py")
    assert not [path for path in sources if re.search(r"^ *(import|from) sklearn", path.read_text(), re.MULTILINE)]
    monkeypatch.setitem(sys.modules, "sklearn", None)
    load("digits")
    load("segdigits")


def test_whoever_changes_the_digits_changes_nobody_elses() -> None:
    digits = read_digits()
    again = [value.clone() for value in digits]
    for value in digits:
        value.zero_()
    assert all(map(torch.equal, read_digits(), again))


def test_digits_are_sklearns_enlarged_smoothly() -> None:
    from sklearn.datasets import load_digits

    images, labels = read_digits()
    bunch = load_digits()
    for own, theirs in zip(small_digits(), (bunch.images, bunch.target), strict=True):
        assert own.dtype == theirs.dtype
        np.testing.assert_array_equal(own, theirs)
    assert images.shape == (1797, 1, 32, 32)
    np.testing.assert_array_equal(labels.numpy(), bunch.target)
    # Averaging every 4x4 block comes close to the original 8x8 grey values (0 to 16).
    small = torch.nn.functional.avg_pool2d(images.float(), 4)[:, 0].numpy() * 16 / 255
    error = np.abs(small - bunch.images)
    assert error.mean() < 1.0
    correlations = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, bunch.images, strict=True)]
    assert min(correlations) > 0.95
    # Smooth: neighbours differ far less than the original's neighbours four pixels apart.
    assert (images[..., 1:].int() - images[..., :-1].int()).abs().float().mean() < 20


def test_fixed_split(digits: FederatedData) -> None:
    redrawn = load("digits", seed=1, clients=9, partition="iid")
    for data in (digits, redrawn):
        names = [name for split in data.clients for name in split.ids]
        assert (len(names), len(data.validation), len(data.tests[""])) == (1200, 247, 350)
        everything = {*names, *data.validation.ids, *data.tests[""].ids}
        assert everything == {f"digits/{i}" for i in range(1797)}
    assert digits.tests[""].ids == redrawn.tests[""].ids
    assert digits.validation.ids == redrawn.validation.ids
    for split in (digits.validation, digits.tests[""]):
        shares = torch.bincount(split.labels, minlength=10) / len(split)
        assert (shares - 0.1).abs().max() < 0.01


def test_statistics_count_the_clients_labels(digits: FederatedData) -> None:
    for k, split in enumerate(digits.clients):
        np.testing.assert_array_equal(
            digits.statistics.counts[k], np.bincount(split.labels.numpy(), minlength=len(digits.classes))
        )
    assert digits.statistics.partition == "dirichlet:0.5"


def test_train_samples_are_a_random_subset_and_validation_keeps_its_proportion() -> None:
    small, again, reseeded = (load("digits", seed=seed, train_samples=300, partition="iid") for seed in (0, 0, 1))
    assert sum(small.client_sizes) == 300
    assert len(small.validation) == round(247 * 300 / 1200)
    assert len(small.tests[""]) == 350
    names = [sorted(name for split in data.clients for name in split.ids) for data in (small, again, reseeded)]
    assert names[0] == names[1] != names[2]
    assert len(set(names[0])) == 300


def test_fewer_test_and_validation_samples() -> None:
    options = {"test_samples": "40", "validation_samples": 20}
    data = load("digits", seed=3, options=options)
    assert (len(data.tests[""]), len(data.validation)) == (40, 20)
    assert load("digits", seed=4, options=options).tests[""].ids == data.tests[""].ids


EMBEDDED = {"digits": (1, 32, 32), **dict.fromkeys(("colordigits", "captions", "segdigits"), (3, 32, 32))}


@pytest.mark.parametrize("name", DATASETS)
def test_registry_entries(name: str) -> None:
    info = DATASETS[name]
    assert info.description
    assert "\n" not in info.description
    assert info.clients >= 1
    if name == "arrays":
        with pytest.raises(UserError, match="is given through Python"):
            load(name)
    elif name in EMBEDDED:
        data = load(name)
        assert data.form.shape == EMBEDDED[name]
        assert len(data.clients) == info.clients
        assert data.statistics.partition == info.partition


@pytest.mark.parametrize("name", ["digits", "colordigits"])
def test_mean_and_std_are_those_of_the_images(name: str) -> None:
    data = load(name, **({"correlation": 0.0} if name == "colordigits" else {}))
    images = torch.cat([split.images for split in data.clients]).double() / 255
    for channel, (mean, std) in enumerate(zip(data.form.mean, data.form.std, strict=True)):
        assert float(images[:, channel].mean()) == pytest.approx(mean, abs=0.02)
        assert float(images[:, channel].std()) == pytest.approx(std, abs=0.02)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"name": "colourdigits"}, 'unknown data set "colourdigits".*Did you mean "colordigits"'),
    ({"name": "digits", "partition": "attribute"}, '"digits" has no attribute'),
    ({"name": "digits", "clients": 1201}, "1201 clients are more than the 1200"),
    ({"name": "digits", "clients": 0}, "at least 1"),
    ({"name": "digits", "train_samples": 5000}, "1200 training samples, so it cannot give 5000"),
    ({"name": "digits", "train_samples": 0}, "cannot give 0"),
    ({"name": "digits", "options": {"protocol": "F7"}}, 'no option "protocol"'),
    ({"name": "digits", "options": {"test_sample": 3}}, 'Did you mean "test_samples"'),
    ({"name": "digits", "options": {"test_samples": True}}, "must be an integer"),
    ({"name": "digits", "options": {"test_samples": -1}}, "at least 0"),
])  # fmt: skip
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(**arguments)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("images", torch.zeros(4, 1, 3, 3).double(), r"images: expected uint8 or float32 .*, got float64 \[4, 1, 3, 3\]"),
    ("labels", torch.zeros(3, dtype=torch.int64), r"labels: expected int64 \[4\], got int64 \[3\]"),
    ("labels", torch.zeros(4), r"labels: expected int64 \[4\], got float32 \[4\]"),
    ("masks", torch.zeros(4, 3, 2, dtype=torch.bool), r"masks: expected bool \[4, 3, 3\], got bool \[4, 3, 2\]"),
    ("ids", ("a",), "ids: expected 4, one for every image, got 1"),
    ("sizes", torch.zeros(4, 3), r"sizes: expected \[4, 2\]"),
])  # fmt: skip
def test_splits_check_their_shapes(field: str, value: object, message: str) -> None:
    good = {"images": torch.zeros(4, 1, 3, 3, dtype=torch.uint8), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        Split(**{**good, field: value})


def test_subset_takes_everything_along() -> None:
    data = load("colordigits")
    part = data.clients[0].subset(torch.tensor([5, 2]))
    assert part.ids == (data.clients[0].ids[5], data.clients[0].ids[2])
    assert torch.equal(part.masks[0], data.clients[0].masks[5])
    assert torch.equal(part.images[1], data.clients[0].images[2])


# -- identity ----------------------------------------------------------------------------------------------------------


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


# -- public ------------------------------------------------------------------------------------------------------------


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
