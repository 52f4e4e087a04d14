"""Tests of arrays in memory: several labels per image, images without a class, floats."""

import warnings

import numpy as np
import pytest
import torch

import fedkern
from fedkern.data import FederatedData, Split
from fedkern.data.split import join_splits
from fedkern.data.types import memory_pool
from fedkern.engine.store.record_files import read_summary
from fedkern.tasks import TASKS

NAMES = ("left", "right", "top")
SMALL = {"model": "mlp", "threads": 1, "workers": 1, "grad_cam": 0, "progress": False, "pictures": False}


def pair(count, seed=0, dtype=np.int64):
    """Return images whose bright halves are their labels, and the labels ``[count, 3]``."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (count, 3))
    pixels = rng.integers(0, 60, (count, 8, 8))
    pixels[:, :, :4] += 65 * labels[:, 0, None, None]
    pixels[:, :, 4:] += 65 * labels[:, 1, None, None]
    pixels[:, :4] += 65 * labels[:, 2, None, None]
    return pixels.astype(np.uint8), labels.astype(dtype)


def sites(**given):
    clients = {"north": pair(60, 1), "south": pair(40, 2)}
    return FederatedData.from_arrays(clients, pair(40, 3), classes=NAMES, **given)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.float32])
def test_columns_are_labels(dtype):
    data = FederatedData.from_arrays([pair(5, dtype=dtype)], {"id": pair(4, 1, dtype)}, validation=pair(3, 2, dtype))
    assert data.task.name == "multilabel"
    assert data.classes == ("0", "1", "2")
    for split, seed in ((data.clients[0], 0), (data.tests["id"], 1), (data.validation, 2)):
        assert split.labels.dtype == torch.uint8
        assert split.labels.tolist() == pair(len(split), seed)[1].tolist()
    assert data.statistics.counts.tolist() == [pair(5)[1].sum(0).tolist()]
    assert data.statistics.sizes.tolist() == [5]
    assert data.statistics.names is None
    assert sites().statistics.names == ("north", "south")


@pytest.mark.parametrize(("change", "sentence"), [
    ({"clients": [(np.zeros((2, 4, 4), np.uint8), [[0, 2], [1, 0]])]}, r"client 0: labels of shape \[2, 2\] are"),
    ({"clients": [(np.zeros((2, 4, 4), np.uint8), [[0, 0.5], [1, 0]])]}, "must be 0 or 1, but some are neither"),
    ({"clients": [(np.zeros((2, 4, 4), np.uint8), [[0, np.nan], [1, 0]])]}, "must be 0 or 1, but some are neither"),
    (
        {"clients": [(np.zeros((2, 4, 4), np.uint8), [[0, 1]] * 3)]},
        r"labels: expected uint8 \[2, 2\], got uint8 \[3, 2\]",
    ),
    ({"test": (np.zeros((2, 4, 4), np.uint8), [[0, 1, 1]] * 2)}, "test: labels must have 2 columns .* but have 3"),
    ({"clients": [(np.zeros((2, 4, 4), np.uint8), [[0], [1]])]}, "two or more columns, but have 1: give labels"),
    ({"test": (np.zeros((2, 4, 4), np.uint8), [0, 1])}, "labels 2 axes like the first client's"),
    ({"test": (np.zeros((2, 4, 4), np.uint8), ["a", "b"])}, "the test set: expected numbers, given <U1"),
    ({"test": ([None, None], [0, 1])}, "the test set: expected numbers, given object"),
    ({"classes": ["a", "b", "c"]}, "classes must name the 2 labels, a name for every column, but has 3"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_said(change, sentence):
    own = np.zeros((2, 4, 4), np.uint8), [[0, 1], [1, 0]]
    with pytest.raises(fedkern.UserError, match=sentence):
        FederatedData.from_arrays(**{"clients": [own], "test": own, **change})


@pytest.mark.parametrize("where", ["one client", "a test set", "nowhere"])
def test_one_hot_labels_are_refused_with_both_ways_out(where):
    """Rows with exactly one label look like classes, unless a row of any set has another number of labels."""
    one_hot, multi = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]], np.array([[1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]])
    images = np.zeros((4, 4, 4), np.uint8)
    given = {
        "clients": {"a": (images, one_hot), "b": (images, multi if where == "one client" else one_hot)},
        "test": {"north": (images, multi if where == "a test set" else one_hot)},
    }
    if where == "nowhere":
        with pytest.raises(
            fedkern.UserError, match=r"exactly one label; .*labels\.argmax\(1\); .*task=\"multilabel\"\.$"
        ):
            fedkern.FederatedData.from_arrays(**given)
        given["task"] = "multilabel"
    assert fedkern.FederatedData.from_arrays(**given).task.name == "multilabel"


@pytest.mark.parametrize("task", ["multilabel", "retrieval", "ordinals", ["classification"], None])
def test_a_task_that_labels_do_not_have_is_refused(task):
    single = np.zeros((4, 4, 4), np.uint8), [0, 1, 0, 1]
    with pytest.raises(fedkern.UserError) as told:
        FederatedData.from_arrays([single], single, task=task)
    words = ", ".join(f'"{known.name}"' for known in TASKS.values() if known.target == "class")
    assert str(told.value) == f"client 0: task must be {words}, or left out, for labels [4], not {task!r}."


@pytest.mark.parametrize("target", ["class", "labels", "pixels"])
def test_another_task_of_such_labels_can_be_named(monkeypatch, target):
    """Every part of the data has the task, also a default validation set, and all data made from these."""
    labels = {"class": [0, 1], "labels": [[0, 1], [1, 1]], "pixels": np.resize([0, 1], (2, 4, 4))}
    own = np.zeros((2, 4, 4), np.uint8), labels[target]
    usual = FederatedData.from_arrays([own], own).task
    task = type("Other", (type(usual),), {"name": "other"})()
    monkeypatch.setitem(TASKS, "other", task)
    data = FederatedData.from_arrays([own, own], {"a": own}, task="other")
    made = (
        *data.clients, data.validation, data.tests["a"], join_splits(data.clients),
        data.clients[0].subset(torch.arange(1)),
    )  # fmt: skip
    assert all(split.task is task for split in made)
    assert FederatedData.from_arrays([own], own, task="auto").task is usual
    with pytest.raises(fedkern.UserError, match=f'task must be "{usual.name}",.* "other", or left out, for labels'):
        FederatedData.from_arrays([own], own, task="another")


@pytest.mark.parametrize("values", [(0, 255), (0, 1, 3), (0, 2), range(40)])
@pytest.mark.parametrize("where", ["clients", "test"])
def test_pixels_that_hold_no_class_numbers_are_refused(values, where):
    pixels = np.resize(np.array(values), (4, 8, 8))
    given = {"clients": pixels % 2, "test": pixels % 2, where: pixels}
    pairs = {name: (np.zeros((4, 8, 8), np.uint8), labels) for name, labels in given.items()}
    with pytest.raises(fedkern.UserError, match=r"labels of pixels hold .* without a gap: name all classes"):
        FederatedData.from_arrays([pairs["clients"]], pairs["test"])
    names = [str(number) for number in range(max(values) + 1)]
    assert FederatedData.from_arrays([pairs["clients"]], pairs["test"], classes=names).classes == tuple(names)


@pytest.mark.parametrize("method", ["afl", pytest.param("fedavg", marks=pytest.mark.exhaustive)])
def test_a_run_learns_every_label(tmp_path, method):
    run = fedkern.simulate(method, data=sites(), rounds=8, local_epochs=4, lr=0.1, out=tmp_path / "run", **SMALL)
    assert run.metrics["macro_auroc"] > 0.9
    assert list(read_summary(tmp_path / "run")["per_class"]["test"]["auroc"]) == list(NAMES)
    assert run.summary["client_names"] == ["north", "south"]
    assert run.evaluate()["macro_auroc"] == pytest.approx(run.metrics["macro_auroc"])
    found = run.predict(pair(40, 3)[0][:, None])
    assert float(((found > 0.5).numpy() == pair(40, 3)[1]).all(1).mean()) == pytest.approx(run.metrics["exact_match"])
    again = fedkern.load(tmp_path / "run", data=sites())
    assert again.extend(9, progress=False, pictures=False, workers=1).summary["rounds"] == 9


@pytest.mark.parametrize("method", ["fedgid", "fediod", "ensemble", "moon"])
def test_methods_for_single_classes_say_so(refuses, tmp_path, method):
    with refuses(f"{method} is for classification.*, but .* is for multilabel"):
        fedkern.simulate(method, data=sites(), out=tmp_path / "run", **{**SMALL, "model": "cnn"})


def make_classes(n):
    return np.full((n, 1, 4, 4), 7, np.uint8), np.arange(n) % 2


@pytest.mark.parametrize("label", [-100, -1, -7])
@pytest.mark.parametrize("where", ["client b", "the test set", "validation", "registered", "by hand"])
def test_an_image_without_a_class_is_refused_everywhere(label, where):
    """The loss left such an image out, and the evaluation ended in a traceback."""
    good, bad = make_classes(4), make_classes(4)
    bad[1][2] = label
    named = "" if where in ("by hand", "registered") else f"{where}: "
    tensors = [torch.from_numpy(part) for part in bad]
    made = {
        "by hand": lambda: Split(*tensors),
        "registered": lambda: memory_pool(*tensors, "x").take(torch.arange(4)),
        "client b": lambda: FederatedData.from_arrays({"a": good, "b": bad}, good),
        "the test set": lambda: FederatedData.from_arrays([good], bad),
        "validation": lambda: FederatedData.from_arrays([good], good, validation=bad),
    }[where]
    error = fedkern.UserError if where in ("client b", "the test set", "validation") else ValueError
    with pytest.raises(error, match=f"^{named}labels: expected the class of every image, .* from 0, got {label};"):
        made()


def floats(n, dtype, exact):
    values = np.random.default_rng(0).random((n, 1, 4, 4))
    return (np.round(values * 255) / 255 if exact else values).astype(dtype), np.arange(n) % 2


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("where", ["clients", "test", "validation"])
def test_floats_that_lose_digits_are_told_once(dtype, where):
    exact, lossy = floats(6, dtype, True), floats(6, dtype, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FederatedData.from_arrays([exact, exact], exact, validation=exact)
        FederatedData.from_arrays([make_classes(4)], make_classes(4))
    with pytest.warns(UserWarning, match="kept in 8 bits") as told:
        data = FederatedData.from_arrays(
            [lossy if where == "clients" else exact] * 2, lossy if where == "test" else exact,
            validation=lossy if where == "validation" else exact,
        )  # fmt: skip
    assert len(told) == 1
    split = {"clients": data.clients[0], "test": data.tests[""], "validation": data.validation}[where]
    change = np.abs(lossy[0].astype(np.float64) - split.images.numpy() / 255).max()
    assert f"the largest change of a value is {change:.2g}." in str(told[0].message)
    assert told[0].filename == __file__
