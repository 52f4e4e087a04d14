"""Tests of classes that only some sets show: a warning where no client trains on them, no error in evaluation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fedkern
from fedkern.data import FederatedData, load
from fedkern.downstream.run_evaluation import _as_trained, _fit_classes
from fedkern.errors import UserError
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import check_data, declared_data, list_caveats

RNG = np.random.default_rng(0)
SIDE = 8


def pictures(count):
    return RNG.integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)


def images(labels):
    return pictures(len(labels)), np.array(labels)


def sets(*labels):
    return pictures(len(labels)), np.array([[int(k in classes) for k in range(3)] for classes in labels])


def masks(*values):
    """Return masks that show the background and one other value in a single pixel."""
    found = np.zeros((len(values), SIDE, SIDE), np.int64)
    found[:, 3, 4] = values
    return pictures(len(values)), found


KINDS = {
    "images": (images([0, 1, 1]), images([1, 0]), images([0, 2, 1])),
    "several labels": (sets((0, 1), (1,)), sets((), (0,)), sets((2, 0), (1,))),
    "masks": (masks(1, 1, -1), masks(0, 1), masks(2, 1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["test", "other", "validation"])
def test_a_class_that_no_client_trains_on_is_told(kind, where):
    common, two, rare = KINDS[kind]
    tests = {"test": two, "other": rare if where == "other" else two}
    if where == "test":
        tests = rare
    data = FederatedData.from_arrays(
        {"A": common, "B": two}, tests, validation=rare if where == "validation" else None, classes=["a", "b", "rare"]
    )
    assert list_caveats(data) == ["Class rare is in a test or validation set, but no client trains on it."]
    trained = replace(
        data, clients=(*data.clients, data.validation if where == "validation" else [*data.tests.values()][-1])
    )
    assert list_caveats(trained) == []
    unshown = replace(data, tests={"": data.clients[0]}, validation=data.clients[1])
    assert list_caveats(unshown) == []


def write(root, rows, masked=()):
    """Write images and masks, and return their table."""
    root.mkdir(exist_ok=True)
    for i, picture in enumerate(pictures(len(rows))):
        Image.fromarray(picture).save(root / f"{i}.png")
    for i, value in enumerate(masked):
        Image.fromarray(np.where(np.eye(SIDE), value, 0).astype(np.uint8)).save(root / f"m{i}.png")
    header = {2: "path,label", 3: "path,label,split"}[len(rows[0])] if not masked else "image,mask"
    (root / "list.csv").write_text("\n".join([header, *map(",".join, rows), ""]))
    return root


def test_the_classes_of_test_rows_of_a_table_and_of_masks(tmp_path):
    rows = [(f"{i}.png", "ab"[i % 2], "train" if i < 20 else "test") for i in range(30)]
    rows[25] = ("25.png", "c", "test")
    data = load("csv", root=write(tmp_path, rows), clients=2, partition="iid", options={"size": SIDE})
    assert list_caveats(data) == ["Class c is in a test or validation set, but no client trains on it."]
    root = tmp_path / "masks"
    shown = [1 + i % 2 for i in range(20)]
    write(root, [(f"{i}.png", f"m{i}.png") for i in range(20)], shown)
    text = (root / "list.csv").read_text().splitlines()
    split = [f"{line},{'test' if value == 2 else 'train'}" for line, value in zip(text[1:], shown, strict=True)]
    (root / "list.csv").write_text("\n".join(["image,mask,split", *split]))
    for cache in (None, tmp_path / "cache"):
        data = load("segmentation", root=root, clients=2, options={"size": SIDE}, cache=cache)
        assert list_caveats(data) == ["Class 2 is in a test or validation set, but no client trains on it."]


def test_nothing_is_told_where_classes_are_not_trained_for_or_the_clients_are_elsewhere():
    common, two, rare = KINDS["images"]
    data = FederatedData.from_arrays([common], rare, validation=two)
    assert len(list_caveats(data)) == 1
    pairs = [replace(split, texts=("x",) * len(split), task=None) for split in (data.validation, data.tests[""])]
    assert list_caveats(replace(data, validation=pairs[0], tests={"": pairs[1]})) == []
    assert list_caveats(declared_data(data, [5, 7])) == []


@pytest.mark.parametrize("kind", ["csv", "folder", "labels"])
def test_a_single_class_is_read_and_not_trained_for(tmp_path, kind):
    write(tmp_path, [(f"{i}.png", "well") for i in range(20)])
    options = {"size": SIDE}
    if kind == "folder":
        (tmp_path / "all" / "well").mkdir(parents=True)
        for path in tmp_path.glob("*.png"):
            path.rename(tmp_path / "all" / "well" / path.name)
    elif kind == "labels":
        options |= {"labels": "label", "task": "multilabel"}
    root = tmp_path / "all" if kind == "folder" else tmp_path
    data = load("folder" if kind == "folder" else "csv", root=root, clients=2, partition="iid", options=options)
    assert data.classes == ("well",)
    assert data.task.name == ("multilabel" if kind == "labels" else "classification")
    with pytest.raises(UserError, match='has the single class "well", expected two or more: name the folder or'):
        check_data(RunConfig.make("fedavg", data="csv", clients=2), data)


def about(classes, task="classification"):
    return {
        "classes": list(classes), "task": task, "channels": 1, "image_size": [SIDE, SIDE], "grey_bits": 0,
        "window": None,
    }  # fmt: skip


@pytest.mark.parametrize("known", [("a", "b", "c", "d"), ("d", "c", "b", "a"), ("b", "d", "a", "c")])
@pytest.mark.parametrize("classes", [("b", "d"), ("c",), ("a", "b", "c", "d"), ("d", "a", "b")])
def test_labels_are_found_by_name(known, classes):
    labels = np.arange(8) % len(classes)
    names = [*classes, "x"] if len(classes) == 1 else [*classes]
    data = FederatedData.from_arrays([images(labels)], {"": images(labels), "n": images(labels)}, classes=names)
    data = replace(data, classes=classes)
    told = _fit_classes(data, about(known), Path("run"))
    assert told.classes == (known if classes != known else classes)
    for split in told.tests.values():
        assert [known[label] for label in split.labels.tolist()] == [classes[label] for label in labels]
    assert told.validation.labels.tolist() == []


def test_several_labels_are_found_by_name():
    data = FederatedData.from_arrays([sets((0, 1), ())], sets((0, 2), (), (1,)), classes=["u", "v", "w"])
    known = ("w", "x", "u", "y", "v")
    found = _fit_classes(data, about(known, "multilabel"), Path("run")).tests[""].labels
    assert found.dtype == torch.uint8
    assert [[known[k] for k in row.nonzero().flatten()] for row in found] == [["w", "u"], [], ["v"]]


@pytest.mark.parametrize(
    ("task", "pair", "known", "classes", "words"),
    [
        ("classification", images([0, 1]), "abc", "ax", "are a, x, but the network in run has a, b, c: name data"),
        ("classification", images([0, 1]), "aab", "ab", "but the network in run has a, a, b"),
        ("segmentation", masks(0, 1), "abc", "ac", "classes .masks: in the same order. and no"),
        ("segmentation", masks(0, 1, 2, 3), "abc", "abcd", "are a, b, c, d, but the network"),
        ("multilabel", sets((0, 1), ()), "abcd", "abx", "are a, b, x, but the network"),
    ],
)  # fmt: skip
def test_other_classes_are_refused(task, pair, known, classes, words):
    data = FederatedData.from_arrays([pair], pair, classes=[*classes])
    with pytest.raises(UserError, match=words):
        _fit_classes(data, about(known, task), Path("run"))


def test_masks_that_lack_the_last_classes():
    data = FederatedData.from_arrays([masks(0, 1)], masks(0, 1))
    told = _fit_classes(data, about("0123", "segmentation"), Path("run"))
    assert told.classes == ("0", "1", "2", "3")
    assert torch.equal(told.tests[""].labels, data.tests[""].labels)


@pytest.mark.parametrize("values", [(1, 3), (2,), (0,), (1, 2, 3)])
def test_masks_of_files_that_lack_classes(tmp_path, values):
    """The network's classes go by name: it does not matter which numbers a site's masks skip."""
    shown = [values[i % len(values)] for i in range(20)]
    root = write(tmp_path, [(f"{i}.png", f"m{i}.png") for i in range(20)], shown)
    config = RunConfig.make("fedavg", data="segmentation", clients=2)
    for names in (("0", "1", "2", "3"), ("ground", "a", "b", "c")):
        known = about(names, "segmentation")
        options = {"size": SIDE, "colour": "grey", **_as_trained("segmentation", known, config)}
        data = load("segmentation", root=root, clients=1, partition="iid", options=options)
        assert _fit_classes(data, known, Path("run")) is data
        assert set(data.clients[0].labels.unique().tolist()) == {0, *values}


@pytest.mark.parametrize("names", ["", "a|b", "a|b|c"])
def test_255_is_no_class_where_there_are_more_than_two(tmp_path, names):
    root = write(tmp_path, [(f"{i}.png", f"m{i}.png") for i in range(20)], [255] * 20)
    opened = lambda: load("segmentation", root=root, clients=2, options={"size": SIDE, "names": names})  # noqa: E731
    if names != "a|b|c":
        assert set(opened().clients[0].labels.unique().tolist()) == {0, 1}
        return
    with pytest.raises(UserError, match="holds 255, expected 0 to 2; where 255 marks unknown pixels"):
        opened()


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["table", "folder", "arrays", "masks", "several labels"])
def test_a_site_without_a_class_gets_its_figures(tmp_path, kind):
    settings = {"rounds": 1, "workers": 1, "threads": 1, "grad_cam": 0, "progress": False, "pictures": False}
    options = {"size": SIDE, "colour": "grey"}
    if kind == "masks":
        root = write(tmp_path / "all", [(f"{i}.png", f"m{i}.png") for i in range(30)], [1 + i % 3 for i in range(30)])
        site = write(tmp_path / "one", [(f"{i}.png", f"m{i}.png") for i in range(20)], [3] * 20)
        name, model = "segmentation", {"model": "unet-small", "width": 2}
    else:
        cells = [("a", "b", "a|b", "")[i % 4] if kind == "several labels" else "abc"[i % 3] for i in range(40)]
        root = write(tmp_path / "all", [(f"{i}.png", cell) for i, cell in enumerate(cells)])
        site = write(tmp_path / "one", [(f"{i}.png", "b") for i in range(20)])
        name, model = "csv", {"model": "mlp"}
    if kind == "several labels":
        for folder in (root, site):
            table = folder / "list.csv"
            table.write_text(table.read_text().replace("label", "labels"))
    run = fedkern.simulate(
        "fedavg", data=name, data_root=root, data_options=options, clients=2, partition="iid", out=tmp_path / "run",
        **settings, **model,
    )  # fmt: skip
    if kind == "arrays":
        found = run.evaluate(FederatedData.from_arrays([images([0, 1])], images([1] * 9 + [0]), classes=["b", "c"]))
    elif kind == "folder":
        (site / "b").mkdir()
        for path in site.glob("*.png"):
            path.rename(site / "b" / path.name)
        found = run.evaluate("folder", data_root=site, data_options=options)
    else:
        found = run.evaluate(name, data_root=site, data_options=options)
    main = {"masks": "dice", "several labels": "exact_match"}.get(kind, "accuracy")
    assert 0 <= found[main] <= 1
    assert all(np.isfinite(value) for value in found.values())
