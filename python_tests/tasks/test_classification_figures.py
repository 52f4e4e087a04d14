"""Tests of figures of classes, several labels, ordinal classes and retrieval: by hand and against scikit-learn."""

import itertools
import json
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from sklearn.metrics import accuracy_score, cohen_kappa_score, mean_absolute_error
from torch.nn import functional

import fedkern
from fedkern import UserError
from fedkern.methods import METHODS, Batch
from fedkern.tasks import MULTILABEL, retrieval
from fedkern.tasks import classification as figures
from fedkern.tasks import multilabel as of_labels
from fedkern.tasks.classification import areas
from fedkern.tasks.ordinal import ORDINAL, CumulativeLink, quadratic_kappa
from fedkern.tasks.retrieval import Gallery, recalls


def answers(n=200, classes=6, seed=0, ties=False):
    """Return labels of all classes but the last, and informative probabilities."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(np.minimum(rng.integers(0, classes, n), classes - 2))
    logits = torch.from_numpy(rng.normal(size=(n, classes))) + 2 * torch.eye(classes, dtype=torch.float64)[labels]
    return labels, (logits.round() if ties else logits).softmax(1)


@pytest.mark.parametrize("seed", range(3))
def test_counts_recalls_and_f1_are_scikit_learns(seed):
    labels, probabilities = answers(seed=seed)
    predicted = probabilities.argmax(1)
    expected = metrics.confusion_matrix(labels, predicted, labels=range(6))
    assert figures.confusion(labels, predicted, 6).tolist() == expected.tolist()
    recalls = figures.recalls(labels, predicted, 6)
    assert math.isnan(recalls[5])  # no sample has this class, though some are taken for it
    assert 5 in predicted
    scores = metrics.recall_score(labels, predicted, average=None, labels=range(5))
    np.testing.assert_allclose(recalls[:5], scores)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = metrics.balanced_accuracy_score(labels, predicted)
    assert float(recalls.nanmean()) == pytest.approx(balanced, abs=1e-12)
    macro = metrics.f1_score(labels, predicted, average="macro", labels=np.unique(labels), zero_division=0)
    assert figures.macro_f1(labels, predicted, 6) == pytest.approx(macro, abs=1e-12)
    # A class that is neither true nor predicted counts nowhere.
    assert figures.macro_f1(labels, predicted, 9) == pytest.approx(macro, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_areas_are_scikit_learns(ties):
    labels, probabilities = answers(ties=ties)
    areas = figures.roc_areas(probabilities, labels)
    expected = [metrics.roc_auc_score(labels == c, probabilities[:, c]) for c in range(5)]
    np.testing.assert_allclose(areas[:5], expected, rtol=0, atol=1e-12)
    assert math.isnan(areas[5])
    own = probabilities[:, :5] / probabilities[:, :5].sum(1, keepdim=True)
    area = metrics.roc_auc_score(labels, own, multi_class="ovr", average="macro")
    assert figures.macro_auc(own, labels) == pytest.approx(area, abs=1e-12)


def test_two_classes_have_the_area_of_the_second():
    labels, probabilities = answers(classes=3)
    two = torch.stack([1 - probabilities[:, 1], probabilities[:, 1]], 1)
    assert figures.macro_auc(two, labels) == pytest.approx(metrics.roc_auc_score(labels, two[:, 1]), abs=1e-12)
    assert math.isnan(figures.macro_auc(two, torch.zeros_like(labels)))  # one class alone has no area


def test_calibration_error_by_hand():
    """Four samples lie in two of four bins: |0.3 - 0| and |0.8 + 0.9 + 0.8 - 2|, over 4 samples."""
    probabilities = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.8, 0.2, 0, 0], [0.05, 0.9, 0.05, 0], [0, 0, 0.8, 0.2]])
    labels = torch.tensor([3, 0, 1, 3])
    error = figures.calibration_error(probabilities.double(), labels, bins=4)
    assert error == pytest.approx((0.3 + abs(0.8 + 0.9 + 0.8 - 2)) / 4)
    # The upper edge belongs to the bin: 0.5 and 0.6 are in different halves, so that their errors do not cancel.
    halves = torch.tensor([[0.5, 0.5], [0.4, 0.6]], dtype=torch.float64)
    assert figures.calibration_error(halves, torch.tensor([1, 1]), bins=2) == pytest.approx((0.5 + 0.4) / 2)
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert figures.calibration_error(sure, torch.tensor([0, 1])) == 0
    assert figures.calibration_error(sure, torch.tensor([1, 0])) == 1


def test_calibration_error_is_a_sum_over_fifteen_bins():
    labels, probabilities = answers(n=500)
    confidence, predicted = probabilities.max(1)
    expected = 0.0
    for b in range(15):
        in_bin = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if in_bin.any():
            accuracy = (predicted == labels)[in_bin].double().mean()
            expected += float(in_bin.double().mean() * (accuracy - confidence[in_bin].mean()).abs())
    assert figures.calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-12)


# -- retrieval ---------------------------------------------------------------------------------------------------------


def unit(*shape: int) -> torch.Tensor:
    return functional.normalize(torch.randn(*shape), dim=1)


def count(queries: torch.Tensor, gallery: torch.Tensor, k: int, right: list[set[int]]) -> float:
    """Count the recall of one query after another, by sorting."""
    scores = queries.double() @ gallery.double().T
    hits = [bool(set(row.argsort(descending=True)[:k].tolist()) & own) for row, own in zip(scores, right, strict=True)]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("chunk", [3, 512])
def test_it_is_what_sorting_gives(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    images = unit(40, 8)
    texts = functional.normalize(images + 0.6 * torch.randn(40, 8), dim=1)
    made = recalls(images, texts, (1, 5, 10))
    own = [{row} for row in range(40)]
    for k in (1, 5, 10):
        assert made[f"i2t_r{k}"] == pytest.approx(count(images, texts, k, own))
        assert made[f"t2i_r{k}"] == pytest.approx(count(texts, images, k, own))
    assert 0 < made["i2t_r1"] < made["i2t_r10"] <= 1
    assert recalls(images, images)["i2t_r1"] == 1
    assert recalls(images, texts, (40, 99)) == pytest.approx(
        {f"{way}_r{k}": 1 for way in ("i2t", "t2i") for k in (40, 99)}
    )


def test_several_captions_belong_to_an_image() -> None:
    images, texts = unit(7, 4), unit(21, 4)
    pairs = torch.stack([torch.arange(21) % 7, torch.arange(21)], 1)[torch.randperm(21)]
    made = recalls(images, texts, (2,), pairs=pairs)
    assert made["i2t_r2"] == pytest.approx(count(images, texts, 2, [{i, i + 7, i + 14} for i in range(7)]))
    assert made["t2i_r2"] == pytest.approx(count(texts, images, 2, [{i % 7} for i in range(21)]))


def test_a_query_without_a_partner_does_not_count() -> None:
    images, texts = unit(5, 4), unit(4, 4)
    pairs = torch.tensor([[0, 0], [3, 2]])
    assert recalls(images, texts, (4,), pairs=pairs)["i2t_r4"] == 1
    made = recalls(images, texts, (1,), pairs=pairs)
    hits = [int((images[i] @ texts.T).argmax()) == t for i, t in pairs.tolist()]
    assert made["i2t_r1"] == pytest.approx(sum(hits) / 2)


def test_equal_scores_count_as_in_a_random_order() -> None:
    collapsed = torch.ones(30, 4) / 2
    assert recalls(collapsed, collapsed) == pytest.approx(
        {f"{way}_r{k}": k / 30 for way in ("i2t", "t2i") for k in (1, 5, 10)}, abs=1e-9
    )
    # One candidate is ahead, then four are level, two of them right: all orders of the four, first two places.
    image = torch.tensor([[1.0, 0.0]])
    level, ahead = torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6])
    texts = torch.stack([ahead, level, level, level, level, torch.tensor([0.0, 1.0])])
    pairs = torch.tensor([[0, 1], [0, 4]])
    orders = list(itertools.permutations((1, 2, 3, 4)))
    expected = sum(bool({1, 4} & set(order[:2])) for order in orders) / len(orders)
    assert recalls(image, texts, (1, 3, 5), pairs=pairs)["i2t_r1"] == 0
    assert recalls(image, texts, (3,), pairs=pairs)["i2t_r3"] == pytest.approx(expected)
    assert recalls(image, texts, (5,), pairs=pairs)["i2t_r5"] == 1


def test_embeddings_that_are_not_numbers_find_nothing() -> None:
    broken = torch.full((20, 4), torch.nan)
    assert recalls(broken, unit(20, 4), (1,))["i2t_r1"] == pytest.approx(1 / 20)


def test_the_gallery_of_a_split() -> None:
    made = Gallery.of(("a", "a", "b", "c"), ("one", "two", "two", "three"))
    assert made.images.tolist() == [0, 2, 3]
    assert sorted(map(tuple, made.pairs.tolist())) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 3)]
    assert Gallery.of(None, ("x", "y")).pairs.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(("images", "texts", "options", "words"), [
    (unit(3, 4), unit(3, 5), {}, r"expected \[I, d\] and \[T, d\], got \[3, 4\] and \[3, 5\]"),
    (unit(3, 4), unit(4, 4), {}, "expected for 3 images and 4 texts"),
    (torch.empty(0, 4), torch.empty(0, 4), {}, "at least one each"),
    (unit(3, 4), unit(3, 4), {"ks": (0,)}, "ks: expected"),
    (unit(3, 4), unit(3, 4), {"pairs": torch.tensor([[0, 3]])}, "texts below 3"),
    (unit(3, 4), unit(3, 4), {"pairs": torch.empty(0, 2)}, "pairs: expected int64"),
])  # fmt: skip
def test_wrong_arguments(images: torch.Tensor, texts: torch.Tensor, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recalls(images, texts, **options)


# -- multilabel --------------------------------------------------------------------------------------------------------


NONE = np.zeros(0, dtype=np.int64)


def draw(n=40, count=5, steps=6, seed=0):
    """Return scores with ties, and labels.

    No image has the last label, and all have the one before it.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-steps, steps, (n, count), generator=generator) / 3
    labels = torch.randint(0, 2, (n, count), generator=generator, dtype=torch.uint8)
    labels[:, -1], labels[:, -2] = 0, 1
    return scores, labels


def pairs_area(scores, own):
    """Return the share of correctly ordered pairs of an image with the label and one without."""
    pairs = list(product(scores[own].tolist(), scores[~own].tolist()))
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def stepwise_precision(scores, own):
    """Return the sum over thresholds, from the highest down, of precision times the gain in recall."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        recall = float((chosen & own).sum() / own.sum())
        total += float((chosen & own).sum() / chosen.sum()) * (recall - before)
        before = recall
    return total


@pytest.mark.parametrize("seed", range(3))
def test_areas_are_shares_of_pairs_in_order_and_average_precision_is_a_sum_over_thresholds(seed):
    scores, labels = draw(seed=seed)
    found, precisions = areas(scores, labels), of_labels.average_precisions(scores, labels)
    assert found[-2:].isnan().all()
    assert math.isnan(precisions[-1])
    assert float(precisions[-2]) == pytest.approx(1.0)
    for column in range(3):
        own = labels[:, column].bool()
        assert float(found[column]) == pytest.approx(pairs_area(scores[:, column], own))
        assert float(precisions[column]) == pytest.approx(stepwise_precision(scores[:, column], own))


def test_figures_are_those_of_scikit_learn():
    scores, labels = (part[:, :3].numpy() for part in draw(100))
    found = of_labels.label_figures(torch.as_tensor(scores), torch.as_tensor(labels))
    assert found["macro_auroc"] == pytest.approx(metrics.roc_auc_score(labels, scores, average="macro"))
    assert found["mean_average_precision"] == pytest.approx(metrics.average_precision_score(labels, scores))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(labels, scores > 0, average="macro"))
    assert found["exact_match"] == pytest.approx(metrics.accuracy_score(labels, scores > 0))


def test_figures_leave_out_labels_without_a_definition():
    scores = torch.tensor([[1.0, -1.0, -2.0], [-1.0, -1.0, 1.0]])
    labels = torch.tensor([[1, 0, 0], [0, 0, 0]], dtype=torch.uint8)
    found = of_labels.label_figures(torch.as_tensor(scores), torch.as_tensor(labels))
    assert found["macro_auroc"] == 1.0
    assert found["mean_average_precision"] == 1.0
    assert found["macro_f1"] == 1.0  # the second label and the third, which is predicted wrongly, do not occur
    assert found["exact_match"] == 0.5
    assert "macro_auroc" not in of_labels.label_figures(scores[:1], labels[:1])


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_no_figure_follows_from_logits_that_are_nan(order):
    """The order of the images, which would rank NaNs, does not matter."""
    scores = torch.full((4, 2), math.nan)
    scores[:, 1] = torch.tensor([1.0, 2.0, math.inf, -math.inf])
    labels = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0]], dtype=torch.uint8)[order]
    for found in (areas(scores, labels), of_labels.average_precisions(scores, labels)):
        assert found.isnan().tolist() == [True, False]
    figures = of_labels.label_figures(scores, labels)
    assert figures.keys() == {"macro_auroc", "mean_average_precision", "macro_f1", "exact_match"}
    assert all(map(math.isnan, figures.values()))


def test_a_network_is_asked_batch_by_batch():
    scores, labels = draw()
    kept = []
    parts = zip(scores.split(7), labels.split(7), strict=True)
    data = SimpleNamespace(batches=lambda: (Batch(*part, NONE) for part in parts), keep=kept.append)
    found = MULTILABEL.figures(torch.nn.Identity(), data)
    assert torch.equal(kept[0], scores)
    p = scores.double().sigmoid()
    loss = -(labels * p.log() + (1 - labels.double()) * (1 - p).log()).mean()
    assert found == {**of_labels.label_figures(scores, labels), "loss": pytest.approx(float(loss))}
    assert float(MULTILABEL.loss(torch.nn.Identity(), Batch(scores, labels, NONE))) == pytest.approx(float(loss))
    with pytest.raises(ValueError, match="at least one sample"):
        MULTILABEL.figures(torch.nn.Identity(), SimpleNamespace(batches=lambda: iter(())))


def test_unvaried_predictions():
    assert of_labels.predicts_alike(torch.tensor([[1.0, -1.0], [2.0, -3.0]]))
    assert not of_labels.predicts_alike(torch.tensor([[1.0, -1.0], [2.0, 3.0]]))


# -- ordinal -----------------------------------------------------------------------------------------------------------


GRADES = ("none", "mild", "severe")


class Score(torch.nn.Module):
    """Network whose score is its input."""

    def forward(self, x):
        return x


def link(classes, thresholds):
    """Return thresholds in fp64, as a link has them."""
    made = CumulativeLink(Score(), classes).double()
    steps = torch.tensor(thresholds, dtype=torch.float64)
    with torch.no_grad():
        made.steps.copy_(torch.cat([steps[:1], (steps.diff().exp() - 1).log()]))
    return made


@pytest.mark.parametrize("thresholds", [[0.3], [-1.0, 0.5, 0.75], [-4.0, -3.9, 2.0, 9.0]])
def test_the_loss_is_that_of_cumulative_probabilities(thresholds):
    classes, score = len(thresholds) + 1, torch.linspace(-6, 6, 13)[:, None]
    made = link(classes, thresholds)
    torch.testing.assert_close(made.thresholds, torch.tensor(thresholds, dtype=torch.float64))
    found = made(score)
    below = torch.sigmoid(torch.tensor(thresholds, dtype=torch.float64) - score.double())
    edges = torch.cat([torch.zeros(13, 1), below, torch.ones(13, 1)], 1)
    torch.testing.assert_close(found.double().exp(), edges.diff(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ORDINAL.probabilities(found), found.exp())
    targets = torch.arange(13) % classes
    loss = ORDINAL.criterion(found, Batch(score, targets, np.arange(13), task=ORDINAL))
    expected = -edges.diff()[torch.arange(13), targets].log()
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ORDINAL.sample_losses(found, targets).double(), expected, rtol=1e-4, atol=1e-6)


def test_scores_far_away_keep_finite_losses_and_gradients():
    made = CumulativeLink(Score(), 5)
    score = torch.tensor([[-1e4], [1e4], [0.0]], requires_grad=True)
    torch.nn.functional.nll_loss(made(score), torch.tensor([4, 2, 1])).backward()
    assert score.grad.isfinite().all()
    assert made.steps.grad.isfinite().all()
    assert (made.thresholds.diff() > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_scikit_learns(seed):
    draw = np.random.default_rng(seed)
    truth, logits = draw.integers(0, 4, 50), torch.from_numpy(draw.normal(size=(50, 4))).log_softmax(1)
    kept, recorded = [], []
    data = SimpleNamespace(
        batches=lambda: (Batch(logits[i : i + 7], torch.from_numpy(truth[i : i + 7]), None) for i in range(0, 50, 7)),
        keep=kept.append,
        record=recorded.append,
    )
    found = ORDINAL.figures(torch.nn.Identity(), data)
    predicted = logits.argmax(1).numpy()
    assert list(found) == ["mae", "kappa", "accuracy", "loss"]
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, predicted))
    assert found["kappa"] == pytest.approx(cohen_kappa_score(truth, predicted, weights="quadratic"))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert recorded[0].tolist() == predicted.tolist()
    assert kept[0].shape == (50, 4)
    assert ORDINAL.score(found) == -found["mae"]


def test_a_set_of_one_class_has_no_kappa():
    assert quadratic_kappa(torch.tensor([[5, 0], [0, 0]])) is None
    assert quadratic_kappa(torch.tensor([[0, 5], [0, 0]])) == 0


def test_the_best_constant_is_the_median():
    data = SimpleNamespace(labels=torch.tensor([0, 0, 1, 3, 3, 3, 3]))
    errors = [np.abs(data.labels.numpy() - c).mean() for c in range(4)]
    assert ORDINAL.chance(data, 4) == pytest.approx(min(errors))
    assert ORDINAL.constant(data, "abcd").figures["mae"] == pytest.approx(min(errors))


def draw_grades(folder, names, count=60):
    """Return grey squares whose brightness is the grade."""
    rows, draw = ["path,label"], np.random.default_rng(0)
    for row in range(count):
        grade = row % len(names)
        pixels = draw.integers(0, 40, (12, 12, 3)) + 70 * grade
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{row}.png")
        rows.append(f"{row}.png,{names[grade]}")
    (folder / "images.csv").write_text("\n".join(rows) + "\n")
    return {"data": "csv", "data_root": str(folder), "model": "cnn", "width": 4, "clients": 2, "partition": "iid",
            "local_epochs": 2, "batch_size": 8, "lr": 0.05, "progress": False, "threads": 1}  # fmt: skip


def test_a_run_learns_the_grades(tmp_path):
    settings = draw_grades(tmp_path, GRADES)
    options = {"size": 12, "task": "ordinal", "order": "|".join(GRADES)}
    run = fedkern.simulate("fedavg", out=tmp_path / "run", rounds=6, data_options=options, **settings)
    assert run.config.main == "mae"
    assert run.config.better == "min"
    assert run.metrics["mae"] < 0.4
    assert run.metrics["kappa"] > 0.5
    assert run.evaluate()["mae"] == run.metrics["mae"]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(summary["per_class"]["test"]["recall"]) == set(GRADES)
    network = run.model()
    assert network.thresholds.shape == (2,)
    assert (tmp_path / "run/report.html").exists() or run.report()
    probabilities = fedkern.load(tmp_path / "run").predict([tmp_path / "0.png"])
    assert math.isclose(float(np.asarray(probabilities).sum()), 1.0, abs_tol=1e-5)


@pytest.mark.exhaustive
def test_with_workers_it_is_the_same_run(tmp_path):
    settings = draw_grades(tmp_path, ("1", "2", "10"), 40)
    options = {"size": 12, "task": "ordinal"}
    made = [
        fedkern.simulate("scaffold", out=tmp_path / f"{n}", rounds=2, workers=n, data_options=options, **settings)
        for n in (1, 2)
    ]
    assert made[0].metrics == made[1].metrics
    serial, two = (run.model().state_dict() for run in made)
    assert all(torch.equal(serial[name], two[name]) for name in serial)


def test_who_refuses(refuses, tmp_path):
    settings = draw_grades(tmp_path, GRADES)
    options = {"size": 12, "task": "ordinal"}
    with pytest.raises(UserError, match="ordinal classes need an order, and mild, none, severe are no numbers"):
        fedkern.simulate("fedavg", out=tmp_path / "run", rounds=1, data_options=options, **settings)
    options["order"] = "|".join(GRADES)
    with refuses(r"fedntd is for classification, but .* is for ordinal: methods for that are"):
        fedkern.simulate("fedntd", out=tmp_path / "run", rounds=1, data_options=options, **settings)
    assert sorted(name for name, kind in METHODS.items() if kind.serves(ORDINAL)) == [
        "afl", "centralised", "ditto", "fedavg", "feddyn", "fedlora", "fedper", "fedprox", "local", "qffl",
        "scaffold",
    ]  # fmt: skip
