"""Tests of figures of several labels per image, against their plain definitions and scikit-learn."""

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedkern.methods.protocol import Batch
from fedkern.tasks import MULTILABEL
from fedkern.tasks import multilabel as of_labels
from fedkern.tasks.classification_figures import areas

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
def test_areas_are_shares_of_pairs_in_order(seed):
    scores, labels = draw(seed=seed)
    found = areas(scores, labels)
    assert found[-1:].isnan().all()
    assert found[-2:].isnan().all()
    for column in range(3):
        assert float(found[column]) == pytest.approx(pairs_area(scores[:, column], labels[:, column].bool()))


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_a_sum_over_thresholds(seed):
    scores, labels = draw(seed=seed)
    found = of_labels.average_precisions(scores, labels)
    assert math.isnan(found[-1])
    assert float(found[-2]) == pytest.approx(1.0)
    for column in range(3):
        expected = stepwise_precision(scores[:, column], labels[:, column].bool())
        assert float(found[column]) == pytest.approx(expected)


@pytest.mark.exhaustive  # importing sklearn.metrics takes seconds
def test_figures_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
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
    with pytest.raises(ValueError, match="at least one sample"):
        MULTILABEL.figures(torch.nn.Identity(), SimpleNamespace(batches=lambda: iter(())))


def test_unvaried_predictions():
    assert of_labels.predicts_alike(torch.tensor([[1.0, -1.0], [2.0, -3.0]]))
    assert not of_labels.predicts_alike(torch.tensor([[1.0, -1.0], [2.0, 3.0]]))


def test_the_loss_is_the_mean_binary_cross_entropy():
    scores, labels = draw()
    batch = Batch(scores, labels, NONE)
    p = scores.double().sigmoid()
    expected = -(labels * p.log() + (1 - labels.double()) * (1 - p).log()).mean()
    assert float(MULTILABEL.loss(torch.nn.Identity(), batch)) == pytest.approx(float(expected))
