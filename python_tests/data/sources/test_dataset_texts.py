"""Tests of data sets of images with texts: retrieval has the bits of fedkern's own image-text data."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, Dataset, Subset

import fedkern
from fedkern.data import load
from python_tests.saved_network import same_network

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
