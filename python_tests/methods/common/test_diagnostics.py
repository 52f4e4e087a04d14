"""Named warnings: each where it should be and nowhere else, undefined figures, and intervals."""

import csv
import dataclasses
import json
import math
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn
from torch.utils.data import Subset

import fedkern
from fedkern import models
from fedkern.data import FederatedData, Split
from fedkern.engine.figures import diagnostics
from fedkern.engine.figures.client_figures import over_clients, with_undefined, worst_client
from fedkern.engine.figures.diagnostics import undefined_figures
from fedkern.engine.figures.intervals import _counts, intervals, wilson
from fedkern.engine.run import run
from fedkern.models.networks.staged import StagedNetwork
from fedkern.models.networks.vit import PatchEmbedding
from fedkern.settings.config import RunConfig
from fedkern.tasks import CLASSIFICATION, SEGMENTATION, TASKS
from fedkern.tasks.multilabel import label_figures
from fedkern.tasks.segmentation import case_dice
from python_tests import own_data
from python_tests.hearing import Hearing

ACCURACY, DICE = (RunConfig.make("fedavg", main=name) for name in ("accuracy", "dice"))


def test_a_healthy_run_has_none(make_data, make_config, tmp_path):
    heard = Hearing()
    summary = run(make_config(rounds=8, local_epochs=3, width=8), out=tmp_path, data=make_data(), listener=heard)
    assert summary["metrics"]["id_accuracy"] > 0.8
    assert summary["diagnostics"] == heard.warnings == {}


@pytest.mark.parametrize(("layer", "modes"), [
    (nn.Upsample(scale_factor=2, mode="bicubic"), ["bicubic"]),
    (nn.Sequential(nn.UpsamplingBilinear2d(4), nn.Upsample(4, mode="trilinear")), ["bilinear", "trilinear"]),
    (nn.Sequential(nn.Upsample(scale_factor=2), nn.ConvTranspose2d(1, 1, 2)), []),
    (models.build("vit-tiny", classes=2, channels=1, image_size=16, width=8, seed=0), ["bicubic"]),
    (models.build("unet-small", classes=2, channels=1, image_size=16, width=2, seed=0), []),
])  # fmt: skip
def test_upsampling_that_does_not_repeat_on_a_gpu(layer, modes):
    for shape in ((1, 16, 16), (1, 16, 24), ()):
        told = diagnostics.warn_unrepeatable(lambda: layer, shape, torch.device("cuda"))
        if modes and (shape == (1, 16, 24) or not isinstance(layer, StagedNetwork)):
            assert f"by {' and '.join(modes)} interpolation" in told.pop("unrepeatable-gradient")
        assert told == {}
        assert diagnostics.warn_unrepeatable(lambda: layer, shape, torch.device("cpu")) == {}


@pytest.mark.parametrize("sides", [(16, 16), (16, 24), (24, 16), (17, 19), (16, 20)])
def test_positions_are_interpolated_where_it_is_said(sides):
    network = models.build("vit-tiny", classes=2, channels=1, image_size=16, width=8, seed=0)
    front = next(module for module in network.modules() if isinstance(module, PatchEmbedding))
    graph = [front(torch.zeros(1, 1, *sides)).grad_fn]
    names = set()
    while graph:
        node = graph.pop()
        names.add(node.name())
        graph += [parent for parent, _ in node.next_functions if parent is not None]
    assert any("Bicubic" in name for name in names) is front.interpolates(*sides)


def test_a_run_on_a_gpu_tells_of_its_own_network(make_data, make_config, tmp_path, monkeypatch):
    own, heard = diagnostics.warn_unrepeatable, Hearing()
    monkeypatch.setattr(
        diagnostics,
        "warn_unrepeatable",
        lambda network, shape, device: own(network, (*shape[:2], 100), torch.device("cuda")),
    )
    data, settings = make_data(), {"model": "vit-tiny", "width": 8, "rounds": 1, "local_steps": 1}
    run(make_config(**settings), out=tmp_path / "run", data=data, listener=heard)
    assert "bicubic" in heard.warnings["unrepeatable-gradient"]


def test_collapsed_class():
    labels = torch.tensor([0, 1, 2, 2])
    sets = {"id_": types.SimpleNamespace(labels=labels, predictions=torch.tensor([0, 0, 2, 2]))}
    for area, way in ((0.51, ": train longer"), (0.85, ", though AUROC is 85.0 %: train longer, weight rare classes")):
        (text,) = diagnostics.collapsed_classes(sets, ["cat", "dog", "cow"], {"id_auroc": area}, ACCURACY).values()
        assert f'Never predicted on the in-distribution test set: 1 of 3 classes ("dog"){way}' in text
    sets["id_"].predictions = torch.tensor([1, 0, 0, 2])
    assert diagnostics.collapsed_classes(sets, ["cat", "dog", "cow"], {}, ACCURACY) == {}


def test_outlying_client():
    clients = {str(k): {"drift": 1.0 + 0.1 * k} for k in range(5)}
    assert diagnostics.outlying_drift(clients) == {}
    clients["3"]["drift"] = 20.0
    assert "client 3 is 17 times as long" in diagnostics.outlying_drift(clients)["outlying-client"]
    assert diagnostics.outlying_drift({"0": {"drift": 1.0}, "1": {"drift": 100.0}}) == {}


@pytest.mark.parametrize(("metrics", "names"), [
    ({"id_accuracy": 0.9, "ood_accuracy": 0.5, "validation_accuracy": 0.85}, set()),
    ({"id_accuracy": 0.9, "ood_accuracy": 0.12, "validation_accuracy": 0.85}, {"chance-level"}),
    ({"id_accuracy": 0.9, "validation_accuracy": 0.7}, {"falling-accuracy"}),
])  # fmt: skip
def test_poor_metrics(metrics, names):
    assert set(diagnostics.poor_metrics(metrics, {"validation_accuracy": 0.9}, 10, {}, ACCURACY)) == names


@pytest.mark.parametrize(
    ("accuracy", "classes", "near"),
    [(1.0, 1, False), (0.74, 2, False), (0.54, 2, True), (0.5, 2, True), (0.149, 10, True), (0.15, 10, False),
     (0.0149, 100, True), (0.02, 100, False)],
)  # fmt: skip
def test_what_is_near_chance(accuracy, classes, near):
    assert ("chance-level" in diagnostics.poor_metrics({"accuracy": accuracy}, {}, classes, {}, ACCURACY)) == near


def build_set(*counts):
    """Return a test set with this many images of every class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return types.SimpleNamespace(labels=labels, task=CLASSIFICATION, cases=None)


@pytest.mark.parametrize(("figures", "said"), [
    (
        {"id_accuracy": 0.9},
        'accuracy on the in-distribution test set is 90.0 %, and predicting "b" everywhere gives 90.0 %',
    ),
    ({"id_accuracy": 0.4}, 'predicting "b" everywhere gives 90.0 %'),
    ({"id_accuracy": 0.9, "ood_auroc": 0.85}, 'predicting "b" everywhere gives 90.0 %: train longer'),
    ({"id_accuracy": 0.9, "id_auroc": 0.5}, 'predicting "b" everywhere gives 90.0 %: train longer'),
    ({"id_accuracy": 0.9, "id_auroc": 0.85}, "gives 90.0 %, but AUROC is 85.0 %: train longer, weight rare"),
    ({"id_inaccuracy": 0.1}, None),  # a metric of the user's
    ({"id_accuracy": math.nan}, "accuracy on the in-distribution test set is NaN in every evaluated round"),
    ({"id_accuracy": 0.92}, None),  # a fifth of the mistakes is gone
    (
        {"id_accuracy": 0.93, "id_balanced_accuracy": 0.36},
        "balanced accuracy on the in-distribution test set is 36.0 %, and predicting one class",
    ),
    ({"id_accuracy": 0.93, "id_balanced_accuracy": 0.5}, None),
    ({"id_lowest_accuracy": 0.9}, '"b" everywhere gives 90.0 %'),
    (
        {"ood_accuracy": 0.36},
        "accuracy on the out-of-distribution test set is 36.0 %, and predicting one class everywhere gives 33.3 %",
    ),
    ({"ood_accuracy": 0.6}, None),
    ({"worst_client_accuracy": 0.6}, None),  # a client's own set has shares of its own
    ({"worst_client_accuracy": 0.34}, "worst client accuracy is 34.0 %, near chance (33.3 %)"),
    ({"validation_accuracy": 0.1, "validation_balanced_accuracy": 0.1}, None),
])  # fmt: skip
def test_an_accuracy_is_compared_with_that_of_a_single_class(figures, said):
    sets = {"id_": build_set(5, 90, 5), "ood_": build_set(10, 10, 10), "validation_": build_set(9, 1, 0)}
    constant = diagnostics.constants(sets, ("a", "b", "c"))
    (text,) = diagnostics.poor_metrics(figures, {}, 3, constant, ACCURACY, (), ["inaccuracy"]).values() or ("",)
    assert (said or "") in text
    assert bool(said) == bool(text)


@pytest.mark.parametrize("name", ["validation_north", "client_a", "a_b", "mean", "dice"])
def test_a_set_with_any_name_is_compared_by_its_own_labels(name):
    sets = {"a_": build_set(1, 1, 1), f"{name}_": build_set(5, 90, 5), "": build_set(3, 3, 3)}
    constant = diagnostics.constants(sets, ("a", "b", "c"))
    found = diagnostics.poor_metrics({f"{name}_accuracy": 0.9}, {}, 3, constant, ACCURACY, ["a", name, ""])
    wanted = f'on the test set "{name}" is 90.0 %, and predicting "b" everywhere gives 90.0 %'
    assert wanted in found["chance-level"]


def test_a_set_with_images_of_one_class_is_compared_with_chance():
    constant = diagnostics.constants({"": build_set(0, 7, 0)}, ("a", "b", "c"))
    assert constant == {}
    assert diagnostics.poor_metrics({"accuracy": 1.0}, {}, 3, constant, ACCURACY) == {}
    assert "near chance" in diagnostics.poor_metrics({"accuracy": 0.1}, {}, 3, constant, ACCURACY)["chance-level"]


def test_a_dice_is_compared_with_that_of_a_single_class():
    """Membranes are a quarter of the pixels, so predicting cell everywhere has a Dice of 2 x 3/4 / (1 + 3/4) = 6/7."""
    labels = torch.ones(4, 8, 8, dtype=torch.int64)
    labels[:, ::4] = 0
    data = types.SimpleNamespace(labels=labels, task=SEGMENTATION, cases=torch.tensor([0, 0, 1, 1]), full=None)
    constant = diagnostics.constants({"": data, "validation_": data}, ("membrane", "cell"))
    assert constant[""].figures["dice"] == pytest.approx(6 / 7)
    text = diagnostics.poor_metrics({"dice": 0.863}, {}, 2, constant, DICE)["chance-level"]
    assert text.startswith('Dice is 86.3 %, and predicting "cell" everywhere gives 85.7 %: ')
    assert diagnostics.poor_metrics({"dice": 0.93}, {}, 2, constant, DICE) == {}
    assert diagnostics.poor_metrics({"worst_client_dice": 0.86}, {}, 2, constant, DICE) == {}
    nothing = diagnostics.poor_metrics({"dice": 0.01}, {}, 2, constant, DICE)["chance-level"]
    assert "hardly anything but background" in nothing


def test_a_run_that_always_says_the_same_is_warned_of(make_data, make_config, tmp_path):
    """Nine of ten test images have one class, so the accuracy is far above one in three."""
    data = make_data(two_tests=False)
    labels = torch.zeros(16, dtype=torch.int64)
    labels[:2] = torch.tensor([1, 2])
    data = dataclasses.replace(data, tests={"": dataclasses.replace(data.tests[""], labels=labels)})
    summary = run(make_config(lr=1e-9), out=tmp_path / "still", data=data)
    assert summary["diagnostics"]["chance-level"].startswith("accuracy is ")
    assert 'predicting "a" everywhere gives 87.5 %' in summary["diagnostics"]["chance-level"]


def test_observations_keep_count_mean_and_range_through_json():
    observed = diagnostics.Observations()
    for value in (1.0, 3.0, math.nan, -2.0):
        observed.add({"x": value, "samples": 7})
    back = diagnostics.Observations(json.loads(json.dumps(observed.to_dict())))
    back.add({"x": 6.0})
    result = back.summary()["x"]
    assert (result.count, result.mean, result.low, result.high) == (4, 2.0, -2.0, 6.0)
    assert set(back.summary()) == {"x"}


# -- client figures ----------------------------------------------------------------------------------------------------


rng = np.random.default_rng(0)


def segmentation(n, objects):
    """Return images of noise.

    Sets with objects have one in every mask.
    """
    masks = np.zeros((n, 8, 8), np.int64)
    if objects:
        masks[:, 2:5, 3:6] = 1
    return rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8), masks


def multilabel(n, varied):
    labels = np.zeros((n, 2), np.uint8)
    if varied:
        labels[::2] = 1
    return rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8), labels


def federation(make, lacking, where):
    """Return three clients with their own test sets, or with parts of the run's test set.

    The client ``lacking`` has no figure.
    """
    data = FederatedData.from_arrays(
        {name: make(6, True) for name in ("Bern", "Graz", "Ulm")}, make(6, True), validation=make(4, True),
        classes=("a", "b"),
    )  # fmt: skip
    tests = [Split(*(torch.from_numpy(part) for part in make(4, k != lacking))) for k in range(3)]
    if where == "own":
        return dataclasses.replace(data, client_tests=tuple(tests))
    images, labels = (torch.cat([getattr(test, name) for test in tests]) for name in ("images", "labels"))
    joined = Split(images, labels, homes=torch.arange(3).repeat_interleave(4))
    return dataclasses.replace(data, tests={"": joined})


def play(data, out, make):
    model = "unet-small" if make is segmentation else "mlp"
    settings = {"rounds": 1, "local_epochs": 1, "threads": 1, "progress": False, "pictures": False, "width": 2}
    return fedkern.simulate("fedavg", data=data, model=model, out=out, **settings)


FIGURES = {segmentation: "dice", multilabel: "macro_auroc"}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("make", FIGURES)
@pytest.mark.parametrize("where", ["own", "part"])
@pytest.mark.parametrize("lacking", [0, 2])
def test_a_client_without_a_figure_is_in_no_mean_and_is_not_the_worst(tmp_path, make, where, lacking):
    figure = FIGURES[make]
    run = play(federation(make, lacking, where), tmp_path / "run", make)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    clients = summary["client_metrics"]
    assert clients[str(lacking)][figure] is None
    judged = [clients[str(k)][figure] for k in range(3) if k != lacking]
    assert all(0 <= value <= 1 for value in judged)
    assert summary["worst_client"]["metric"] == figure
    assert summary["worst_client"]["value"] == min(judged)
    assert summary["worst_client"]["client"] != lacking
    if where == "own":
        assert run.metrics[f"mean_client_{figure}"] == pytest.approx(sum(judged) / 2)
        assert run.metrics[f"worst_client_{figure}"] == min(judged)
    name = ("Bern", "Graz", "Ulm")[lacking]
    with (tmp_path / "run/evaluation.csv").open(newline="") as file:
        values = {row["client"]: row["value"] for row in csv.DictReader(file) if row["metric"] == figure}
    assert values[name] == ""
    assert sum(value != "" for value in values.values()) == 3  # the run's test set and two clients
    text = json.dumps(summary["diagnostics"])
    assert f"1 of 3 clients ({lacking} ({name}))" in text
    assert "; mean and worst client leave them out" in text
    assert "NaN" not in (tmp_path / "run/summary.json").read_text()
    assert run.report().exists()


@pytest.mark.parametrize("make", FIGURES)
def test_a_test_set_without_a_figure_has_none(tmp_path, make):
    data = federation(make, None, "own")
    empty = Split(*(torch.from_numpy(part) for part in make(4, False)))
    run = play(dataclasses.replace(data, tests={"id": data.tests[""], "ood": empty}), tmp_path / "run", make)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert f"id_{FIGURES[make]}" in run.metrics
    assert f"ood_{FIGURES[make]}" not in run.metrics
    assert "The out-of-distribution test set has no" in json.dumps(summary["diagnostics"])
    assert f"ood_{FIGURES[make]}" not in run.evaluate()


def test_a_metric_that_is_nan_at_a_client_is_in_no_mean(tmp_path):
    sites, test = own_data.table()
    tests = {name: Subset(test, range(start, 20)) for name, start in zip(sites, (0, 5, 19), strict=True)}
    metrics = {"auc": lambda outputs, targets: len(targets) / 20 if len(targets) > 1 else float("nan")}
    run = fedkern.simulate(
        "fedavg", data=sites, test=tests, model=own_data.Rows(), metrics=metrics, main="auc", better="max", rounds=1,
        out=tmp_path / "run", progress=False, pictures=False, workers=1,
    )  # fmt: skip
    assert (run.metrics["mean_client_auc"], run.metrics["worst_client_auc"]) == (0.875, 0.75)
    assert run.summary["worst_client"]["name"] == "site 1"
    assert run.summary["client_metrics"]["2"]["auc"] is None
    assert "1 of 3 clients (2 (site 2)) have NaN as auc" in run.summary["diagnostics"]["no-client-auc"]


def test_the_clients_that_have_a_figure_are_compared():
    class Set:
        full = None

        def __init__(self, labels):
            self.labels, self.task = torch.tensor(labels)[:, None, None].expand(-1, 2, 2), SEGMENTATION

        def __len__(self):
            return 2

    sets = {0: Set([1, 0]), 1: Set([0, 0]), 2: Set([1, 1])}
    figures = {0: {"dice": 0.5, "loss": 1.0}, 1: {"loss": 9.0}, 2: {"dice": 0.75, "loss": 2.0}}
    assert over_clients(figures, sets)["mean_client_dice"] == 0.625
    assert over_clients(figures, sets)["worst_client_loss"] == 9.0
    tenths = over_clients({k: {"loss": float(k)} for k in range(20)}, sets)
    assert (tenths["worst_tenth_client_loss"], tenths["best_tenth_client_loss"]) == (18.5, 0.5)
    assert "best_tenth_client_loss" not in over_clients({k: {"loss": 1.0} for k in range(19)}, sets)
    assert worst_client(figures, sets) == (0, "dice")
    assert worst_client({k: figures[k] for k in (1, 2)}, sets) is None  # nobody to compare with
    assert over_clients({**figures, 0: {"dice": math.nan}}, sets)["worst_client_dice"] == 0.75
    assert worst_client({k: {"loss": figures[k]["loss"]} for k in figures}, sets) == (1, "loss")
    shown = with_undefined(figures, sets)
    assert [figures["dice"] for figures in shown.values()] == [0.5, None, 0.75]
    assert undefined_figures({"": sets[0]}, shown, str)["no-client-dice"].startswith(
        "1 of 3 clients (1) have no mask with an object"
    )


# -- intervals ---------------------------------------------------------------------------------------------------------


FEDERATION = SimpleNamespace(client_names=("Ulm", "Bonn"), classes=("a", "b"))


class Kept(SimpleNamespace):
    """A set with the ``output`` of its evaluation.

    ``patients`` are int64 ``[n]`` or None.
    """

    def __init__(self, task, labels, output, patients=None, homes=None, cases=None):
        named = None if patients is None else torch.tensor(patients)
        split = SimpleNamespace(units=lambda: patients, patients=named, cases=cases, homes=homes)
        super().__init__(task=TASKS[task], labels=labels, kept=[(None, output)], split=split, cases=cases)

    def __len__(self):
        return len(self.labels)


def of(data, seed=0, own=None):
    return intervals({"": data}, own or {}, FEDERATION, seed, own=False)


@pytest.mark.parametrize("task", ["classification", "ordinal", "multilabel", "segmentation"])
def test_figures_of_draws_are_those_of_the_samples_drawn(task):
    rng = np.random.default_rng(0)
    units, rows = rng.permutation(np.arange(40) % 9), np.arange(5, 45)
    logits, labels = torch.from_numpy(rng.normal(size=(45, 2)).round(1)), torch.from_numpy(rng.integers(0, 2, 45))
    cases, output = None, logits
    if task == "multilabel":
        labels = torch.stack([labels, 1 - labels.roll(1)], 1).to(torch.uint8)
    elif task == "segmentation":  # two images a case, all of one unit
        cases, units = torch.arange(45) // 2 % 20, np.arange(5, 45) // 2 % 10
        output = case_dice(torch.from_numpy(rng.integers(1, 9, (20, 3, 3))))
    data, counts = Kept(task, labels, output, cases=cases), _counts(rng, 6, units.max() + 1)
    assert (counts.sum(1) == units.max() + 1).all()
    found = data.task.resample_figure(output, labels, cases, rows, units, counts)
    for figure, count in zip(found, counts, strict=True):
        drawn = np.repeat(rows, count[units].astype(int))
        predicted, true = logits[drawn].argmax(1), labels[drawn]
        if task == "multilabel":
            expected = label_figures(logits[drawn], true)["macro_auroc"]
        elif task == "segmentation":
            firsts = [row for row in drawn.tolist() if row in np.unique(cases, return_index=True)[1]]
            expected = float(output[cases[firsts], 1:].nanmean(0).nanmean())
        else:
            expected = float((predicted - true).abs().double().mean())
            expected = 1 - expected if task == "classification" else expected
        assert figure == pytest.approx(expected, rel=1e-12)


def test_patients_are_drawn_with_all_of_their_images():
    rng, covered = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(100):
        patients = np.repeat(np.arange(12), rng.integers(1, 20, 12))
        right = rng.random(len(patients)) < rng.beta(2, 1, 12)[patients]
        labels, output = torch.zeros(len(right), dtype=torch.int64), torch.eye(2)[(~right).astype(int)]
        for grouped in (True, False):
            (row,) = of(Kept("classification", labels, output, patients if grouped else None))
            covered[grouped] += row["low"] <= 2 / 3 <= row["high"]
    assert covered[True] >= 88 > 80 > covered[False]
    assert (row["value"], row["samples"]) == (right.mean(), len(right))


def test_few_units_units_that_agree_and_sites():
    labels, right, people = torch.zeros(20, dtype=torch.int64), torch.eye(2)[[0] * 20], np.arange(20) // 2
    homes = torch.tensor([0] * 8 + [1] * 12)
    total, ulm, bonn = of(Kept("classification", labels, right, people, homes))
    assert (total["low"], total["high"], total["unit"], total["units"]) == (*wilson(10, 10), "patients", 10)
    assert (ulm["client"], ulm["low"], ulm["units"]) == ("Ulm", None, 4)
    assert (bonn["client"], bonn["low"], bonn["samples"]) == ("Bonn", wilson(6, 6)[0], 12)
    _, own = of(Kept("classification", labels, right), own={1: Kept("classification", labels, right, homes=homes)})
    assert (own["set"], own["client"], own["low"], own["unit"]) == ("own", "Bonn", wilson(20, 20)[0], "samples")
    (exact,) = of(Kept("ordinal", labels, right, people))
    assert (exact["value"], exact["low"]) == (0.0, None)
    scores = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    mixed = Kept("multilabel", (scores.roll(1, 0) > 0).to(torch.uint8), scores, people)
    assert of(mixed) == of(mixed) != of(mixed, seed=1)
    assert of(Kept("retrieval", labels, right)) == []


@pytest.mark.parametrize(("count", "total"), [(0, 7), (7, 7), (1, 2), (311, 450), (9999, 10000)])
def test_intervals_are_those_of_scipy(count, total):
    expected = binomtest(count, total).proportion_ci(0.95, "wilson")
    assert wilson(count, total) == pytest.approx((expected.low, expected.high), rel=1e-12)
