"""Tests of a segmentation's figures, and of every method that learns one."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from fedkern.data import IGNORE, FederatedData, PartitionStatistics, Split
from fedkern.data.forms import ImageForm
from fedkern.downstream.saved_network import read_model
from fedkern.engine.batches.images import Images
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.local.network import Network
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods import METHODS, Batch, Phase, Scaffold
from fedkern.settings.config import RunConfig
from fedkern.tasks import SEGMENTATION
from fedkern.tasks.segmentation import constant_dice, dice, hausdorff95, overlaps, pixelwise_loss, segmentation

METHODS_HERE = sorted({name for name, kind in METHODS.items() if kind.serves(SEGMENTATION)} - {"fedlora"})
"""All but the one that needs linear layers, of which a U-Net has none."""


class Told:
    """Test set, and a network of given answers."""

    task = SEGMENTATION

    def __init__(self, predicted, truth, classes=3, cases=None, size=2):
        self.predicted, self.truth, self.classes, self.cases, self.size = predicted, truth, classes, cases, size
        self.recorded = None

    def batches(self):
        for start in range(0, len(self.truth), self.size):
            rows = slice(start, start + self.size)
            logits = 50.0 * one_hot(self.predicted[rows], self.classes).movedim(-1, 1)
            yield Batch(logits, self.truth[rows], np.arange(len(logits)))

    def record(self, predictions):
        self.recorded = predictions

    def figures(self):
        return segmentation(torch.nn.Identity(), self)


def masks(seed=0, n=5, classes=3, side=7):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, classes, (n, side, side)))


def slow_dice(predicted, truth, classes, cases):
    """Compute the Dice by case and class: the truth's classes, and in a healthy case the predicted ones."""
    rows = []
    for case in cases.unique():
        p, t = predicted[cases == case], truth[cases == case]
        healthy = not (t > 0).any()
        known = t >= 0
        row = []
        for c in range(1, classes):
            a, b = (p == c) & known, t == c
            row.append(
                2 * float((a & b).sum()) / float(a.sum() + b.sum()) if b.any() or (healthy and a.any()) else math.nan
            )
        rows.append(row)
    return np.nanmean(np.array(rows), 0)


@pytest.mark.parametrize("cases", [None, [0, 0, 1, 1, 1]])
@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("healthy", [[], [1], [0, 4], [0, 1]])
def test_dice_is_the_mean_of_cases_then_of_classes(cases, size, healthy):
    predicted, truth = masks(0), masks(1)
    truth[truth == 2] *= torch.arange(5).remainder(2)[:, None, None].expand_as(truth)[truth == 2]  # class 2 in some
    truth[0, :2] = IGNORE
    for row in healthy:
        truth[row].clamp_(max=0)
        if row == healthy[-1]:  # one of them is seen as healthy, in part
            predicted[row].clamp_(max=1)
    cases = None if cases is None else torch.tensor(cases)
    found = Told(predicted, truth, cases=cases, size=size).figures()
    expected = slow_dice(predicted, truth, 3, torch.arange(5) if cases is None else cases)
    assert found["dice_1"] == pytest.approx(expected[0])
    assert found["dice_2"] == pytest.approx(expected[1])
    assert found["dice"] == pytest.approx(expected.mean())
    known = truth >= 0
    a = [((predicted == c) & known, truth == c) for c in (1, 2)]
    assert found["iou"] == pytest.approx(np.mean([float((p & t).sum()) / float((p | t).sum()) for p, t in a]))
    wrong = float((predicted != truth)[known].double().mean())
    assert found["loss"] == pytest.approx(50 * wrong, rel=1e-5)


def test_perfect_empty_and_missed():
    truth = torch.zeros(3, 6, 8, dtype=torch.int64)
    truth[0, 1:4, 2:5] = 1
    told = Told(truth.clone(), truth, classes=2)
    found = told.figures()
    assert (found["dice"], found["iou"], found["hd95"]) == (1, 1, 0)
    assert "dice_1" not in found  # one class: it is the mean
    assert torch.equal(told.recorded.long(), truth)
    missed = Told(torch.zeros_like(truth), truth, classes=2).figures()
    assert (missed["dice"], missed["iou"], missed["hd95"]) == (0, 0, 10)  # the diagonal
    # Found where there is nothing: a case of Dice 0, beside one of Dice 1 and one without.
    false = truth.clone()
    false[1, 0, 0] = 1
    extra = Told(false, truth, classes=2).figures()
    assert extra["dice"] == 0.5
    assert extra["iou"] == 0.9
    for predicted in (truth, torch.zeros_like(truth)):
        nothing = Told(predicted, torch.zeros_like(truth), classes=2).figures()
        assert set(nothing) == {"loss"}
    with pytest.raises(ValueError, match="at least one labelled pixel"):
        Told(truth, torch.full_like(truth, IGNORE)).figures()


@pytest.mark.parametrize("cases", [None, [0, 0, 1, 1, 1]])
@pytest.mark.parametrize(
    "predicted", [masks(seed=4), torch.full((5, 7, 7), 2), torch.zeros(5, 7, 7, dtype=torch.int64)]
)
def test_a_class_that_a_set_lacks_is_in_no_mean(cases, predicted):
    """The figures are those of the other classes, whatever the prediction."""
    truth = masks(seed=5).clamp(max=1)
    cases = None if cases is None else torch.tensor(cases)
    told, kept = Told(predicted, truth, cases=cases), []
    told.keep = kept.append
    found = told.figures()
    assert torch.isnan(kept[0].nanmean(0)).tolist() == [False, False, True]
    assert "dice_2" not in found
    assert found["dice"] == found["dice_1"]
    overlap, either = ((predicted == 1) & (truth == 1)).sum(), ((predicted == 1) | (truth == 1)).sum()
    assert found["iou"] == pytest.approx(float(overlap) / float(either))


def test_unknown_pixels_count_nowhere():
    predicted, truth = masks(2), masks(3)
    truth[:, 3:5] = IGNORE
    changed = predicted.clone()
    changed[:, 3:5] = 0
    figures, second = Told(predicted, truth).figures(), Told(changed, truth).figures()
    assert figures == second
    counts = overlaps(predicted, truth, 3)
    assert counts.shape == (5, 3, 3)
    assert int(counts[:, 2].sum()) == int((truth >= 0).sum())
    assert torch.isnan(dice(counts * torch.tensor([1, 1, 0]))[2])


def slow_hausdorff(a, b):
    """Compare every outline pixel of one mask with every one of the other."""

    def outline(mask):
        padded = np.pad(mask, 1)
        inner = padded.copy()
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            inner &= np.roll(padded, step, axis)
        return np.argwhere(padded & ~inner)

    outline_a, second = outline(a), outline(b)
    far = np.linalg.norm(outline_a[:, None] - second[None], axis=2)
    return max(np.percentile(far.min(1), 95), np.percentile(far.min(0), 95))


@pytest.mark.parametrize("shape", [(12, 9), (6, 7, 8)])
def test_hausdorff_distance_against_all_pairs(shape):
    rng = np.random.default_rng(0)
    for _ in range(4):
        a, b = rng.random(shape) < 0.15, rng.random(shape) < 0.1
        assert hausdorff95(a, b) == pytest.approx(slow_hausdorff(a, b))
        assert hausdorff95(a, b) == hausdorff95(b, a)
    empty = np.zeros(shape, dtype=bool)
    assert hausdorff95(a, a) == hausdorff95(empty, empty) == 0
    assert hausdorff95(empty, a) == pytest.approx(np.linalg.norm(shape))
    with pytest.raises(ValueError, match="expected shape"):
        hausdorff95(a, a[1:])


def test_the_figures_are_those_of_the_task():
    told = Told(masks(0), masks(1))
    assert METHODS["fedavg"]().evaluate(torch.nn.Identity(), told) == told.figures()


# runs


def split(n, seed, classes=3, side=16):
    """Return squares of the brightness of their class on a dark ground."""
    rng = np.random.default_rng(seed)
    labels = torch.zeros(n, side, side, dtype=torch.int64)
    for i in range(n):
        y, x = rng.integers(0, side - 6, 2)
        labels[i, y : y + 6, x : x + 6] = 1 + i % (classes - 1)
    noise = torch.from_numpy(rng.integers(0, 40, (n, 1, side, side)))
    return Split((100 * labels[:, None] + noise).to(torch.uint8), labels)


def federation(sizes=(12, 9, 7), public=0):
    clients = tuple(split(n, k) for k, n in enumerate(sizes))
    counts = [client.labels.flatten(1).amax(1).numpy() for client in clients]
    return FederatedData(
        name="squares", classes=("ground", "grey", "white"), clients=clients, validation=split(6, 11),
        tests={"": split(10, 12)}, form=ImageForm(tuple(clients[0].images.shape[1:]), (0.2,), (0.2,)),
        statistics=PartitionStatistics.of(counts, ("ground", "grey", "white"), "iid"),
        public=split(public, 13) if public else None,
    )  # fmt: skip


def settings(method="fedavg", **given):
    plain = {"data": "segmentation", "model": "unet-small", "width": 2, "rounds": 1, "local_epochs": 1, "clients": 3}
    plain |= {"batch_size": 4, "optimizer": "sgd", "lr": 0.05, "threads": 1}
    if METHODS[method].one_shot:
        del plain["rounds"]
    return RunConfig.make(method, **{**plain, **given})


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", METHODS_HERE)
def test_every_method_for_segmentation_runs(tmp_path, method):
    options = {"distill_epochs": 1} if method == "feddf" else {}
    config = settings(method, options=options, public_samples=6 if method == "feddf" else 0)
    metrics = run(config, out=tmp_path, data=federation(public=6 if method == "feddf" else 0))["metrics"]
    assert {"dice", "iou", "dice_1", "dice_2", "loss", "validation_dice"} <= set(metrics)
    assert 0 <= metrics["dice"] <= 1
    module, about = read_model(tmp_path)
    assert about["task"] == "segmentation"
    assert module(torch.zeros(2, 1, 16, 16)).shape == (2, 3, 16, 16)


def test_it_is_learnt(tmp_path):
    untrained = run(settings(lr=1e-6), out=tmp_path / "a", data=federation())["metrics"]["dice"]
    config = settings(rounds=6, local_epochs=2, width=4, lr=0.2, augment="flip-rotate", eval_every=6)
    metrics = run(config, out=tmp_path / "b", data=federation((24, 20, 20)))["metrics"]
    assert metrics["dice"] > max(0.7, untrained + 0.2)
    assert metrics["hd95"] < 8


def test_the_usual_methods_are_among_them():
    local_methods = {"local", "centralised", "ensemble", "oneshot-fedavg", "feddf"}
    assert {"fedavg", "fedprox", "scaffold", "feddyn"} | local_methods <= set(METHODS_HERE)
    assert not {"fedgid", "ccvr", "dense", "fusefl", "moon", "fedproto"} & set(METHODS_HERE)


def test_unlabelled_pixels_are_not_learnt():
    """The loss is the mean over the pixels that have a label, and the others' logits get no gradient."""
    logits = torch.randn(4, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    labels = split(4, 0).labels
    labels[:, :5] = IGNORE
    batch = Batch(torch.zeros(4, 1, 16, 16), labels, np.arange(4), task=SEGMENTATION)
    loss = METHODS["fedavg"]().loss(lambda images: logits, batch, None)
    assert torch.allclose(loss, cross_entropy(logits[:, :, 5:], labels[:, 5:]))
    loss.backward()
    assert not logits.grad[:, :, :5].any()
    assert logits.grad[:, :, 5:].all()


def test_a_batch_of_which_nothing_is_known_moves_nothing():
    logits = torch.randn(2, 3, 16, 16, requires_grad=True)
    batch = Batch(torch.zeros(2, 1, 16, 16), torch.full((2, 16, 16), IGNORE), np.arange(2), task=SEGMENTATION)
    for per_sample in (False, True):
        loss = METHODS["fedavg"]().loss(lambda images: logits, dataclasses.replace(batch, per_sample=per_sample), None)
        loss.backward()
        assert float(loss.detach()) == 0
        assert not logits.grad.any()


def test_the_usual_loss_has_the_bits_of_cross_entropy():
    labels = split(4, 0).labels
    for unknown in (0, 5):
        labels[:, :unknown] = IGNORE
        logits, two = (torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        losses = pixelwise_loss(logits.requires_grad_(), labels), cross_entropy(two.requires_grad_(), labels)
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        assert torch.equal(logits.grad, two.grad)


def unknown(split):
    return dataclasses.replace(split, labels=torch.full_like(split.labels, IGNORE))


def test_a_client_of_which_nothing_is_known_does_not_diverge(tmp_path):
    data = federation()
    data = dataclasses.replace(data, clients=(*data.clients[:2], unknown(data.clients[2])))
    metrics = run(settings(rounds=2), out=tmp_path, data=data)["metrics"]
    assert math.isfinite(metrics["loss"])


def test_a_set_without_a_known_pixel_is_told_before_the_training(tmp_path):
    data = federation()
    own = (split(3, 20), unknown(split(3, 21)), split(3, 22))
    for changed, words in (
        ({"tests": {"": unknown(data.tests[""])}}, "The test set has no pixel whose class is known"),
        ({"tests": {"id": data.tests[""], "ood": unknown(split(2, 5))}}, "out-of-distribution test set has no pixel"),
        ({"validation": unknown(data.validation)}, "The validation set has no pixel"),
        ({"client_tests": own}, "Client 1's own test set has no pixel.*--client-test"),
    ):
        with pytest.raises(UserError, match=words):
            run(settings(), out=tmp_path / "run", data=dataclasses.replace(data, **changed))
        assert not (tmp_path / "run" / "model.safetensors").exists()


def test_training_moves_masks_with_their_images():
    sample = split(8, 5)
    data = Images(sample, ImageForm(sample.images.shape[1:], (0.2,), (0.2,)), torch.device("cpu"), augment="crop-flip")
    rows = np.array([3, 1, 6])
    plain, labels = data.pairs(rows)
    assert torch.equal(labels, sample.labels[rows])
    moved, classes = data.pairs(rows, np.random.default_rng(0))
    bright = [(image[0] > 0.5) for image in (*plain, *moved)]
    assert all(torch.equal(seen, truth > 0) for seen, truth in zip(bright, (*labels, *classes), strict=True))
    assert not torch.equal(classes, labels)
    for batch in data.batches(4, augment=True, rng=np.random.default_rng(0)):
        assert torch.equal(batch.inputs[:, 0] > 0.5, batch.targets > 0)


def test_scaffolds_gradient_at_the_received_model_counts_known_pixels():
    data = federation((20, 9))  # 20 images are more than one backward pass takes
    half = dataclasses.replace(data.clients[0], labels=data.clients[0].labels.clone())
    half.labels[:3] = IGNORE
    half.labels[5:, :8] = IGNORE
    data = dataclasses.replace(data, clients=(half, data.clients[1]))
    context = RunContext(
        settings("scaffold", clients=2, freeze_bn_after=0), data
    )  # or every part has its own statistics
    message, client = context.networks.initial(), Client(context, 0, {})
    found = Scaffold(Scaffold.Options(control="I")).gradient(client, Phase(0, "train", "update"), message)
    network = Network(context.networks.build(), torch.device("cpu"))
    network.write(message)
    network.fixed = True
    network.train_mode()
    expected = network.gradients
    pixels = context.samples.of_client(0)
    pixelwise_loss(network.module(pixels.pixels.take(np.arange(20))), half.labels).backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_best_constant_prediction_is_found(grouped):
    """The comparison is with networks that predict one class everywhere."""
    truth = masks(seed=3, n=6, classes=4)
    truth[truth == 3] = IGNORE
    truth[:2, :, :5] = 2
    cases = torch.tensor([0, 0, 1, 1, 2, 2]) if grouped else None
    scores = [Told(torch.full_like(truth, c), truth, classes=4, cases=cases).figures()["dice"] for c in range(4)]
    value, best = constant_dice(SimpleNamespace(labels=truth, cases=cases), 4)
    assert value == pytest.approx(max(scores))
    assert scores[best] == max(scores) > 0
    assert constant_dice(SimpleNamespace(labels=torch.zeros(2, 3, 3, dtype=torch.int64)), 4) == (0.0, 0)


def test_the_dice_of_every_class_is_kept():
    truth = masks()
    told, kept = Told(masks(seed=1), truth), []
    told.keep = kept.append
    found = told.figures()
    means = kept[0].nanmean(0)
    expected = dice(overlaps(masks(seed=1), truth, 3))
    assert torch.equal(means, expected)
    assert means[1:].tolist() == [found["dice_1"], found["dice_2"]]
