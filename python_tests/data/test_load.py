"""Tests of the embedded digits, and of the checks of `load` on every data set."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fedkern
from fedkern.data import DATASETS, FederatedData, Split, load
from fedkern.data.sources.digits import read_digits, small_digits
from fedkern.errors import UserError


@pytest.fixture(scope="module")
def digits() -> FederatedData:
    return load("digits", seed=0)


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for own, theirs in zip(small_digits(), (bunch.images, bunch.target), strict=True):
        assert own.dtype == theirs.dtype
        np.testing.assert_array_equal(own, theirs)


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


def test_the_seed_reproduces(digits: FederatedData) -> None:
    again = load("digits", seed=0)
    for a, b in zip(digits.clients, again.clients, strict=True):
        assert torch.equal(a.images, b.images)
        assert a.ids == b.ids


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
