"""Named warnings: each appears where it should and nowhere else."""

import dataclasses
import math
import types

import pytest
import torch
from torch import nn

from fedkern import models
from fedkern.engine.figures import diagnostics
from fedkern.engine.run import run
from fedkern.models.networks.staged import StagedNetwork
from fedkern.models.networks.vit import PatchEmbedding
from fedkern.settings.config import RunConfig
from fedkern.tasks import CLASSIFICATION, SEGMENTATION
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
    import json

    observed = diagnostics.Observations()
    for value in (1.0, 3.0, math.nan, -2.0):
        observed.add({"x": value, "samples": 7})
    back = diagnostics.Observations(json.loads(json.dumps(observed.to_dict())))
    back.add({"x": 6.0})
    result = back.summary()["x"]
    assert (result.count, result.mean, result.low, result.high) == (4, 2.0, -2.0, 6.0)
    assert set(back.summary()) == {"x"}
