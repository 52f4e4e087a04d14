"""Tests of a classifier's figures, against scikit-learn and by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from fedkern.tasks import classification_figures as figures


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
