"""Tests of linear probes, areas under the curve and the light decoder, against scikit-learn and by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from fedkern.data import IGNORE
from fedkern.downstream import tasks
from fedkern.downstream.tasks import train_decoder
from fedkern.models import build_pair
from fedkern.tasks.segmentation import segmentation


def blobs(n: int = 60, classes: int = 3, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % classes
    return 3 * torch.eye(classes, width)[labels] + torch.randn(n, width) * torch.arange(1, width + 1), labels


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_the_probe_is_scikit_learns_logistic_regression(penalty: float) -> None:
    features, labels = blobs()
    features[:, 4] = 7.0  # a constant feature
    made = tasks.LinearProbe(features, labels, 3, penalty).logits(features).softmax(1)
    scaled = StandardScaler().fit_transform(features.double().numpy())
    theirs = LogisticRegression(C=1 / (penalty * len(features)), tol=1e-10, max_iter=5000).fit(scaled, labels.numpy())
    np.testing.assert_allclose(made.numpy(), theirs.predict_proba(scaled), atol=2e-5)


def test_a_class_that_does_not_occur_is_never_preferred() -> None:
    features, labels = blobs()
    made = tasks.LinearProbe(features, labels, 5, 1e-2).logits(features)
    assert made.shape == (60, 5)
    assert int(made.argmax(1).max()) < 3


def test_areas_are_scikit_learns() -> None:
    labels = torch.arange(90) % 4
    scores = (torch.rand(90, 4) + torch.eye(4)[labels] / 4).mul(8).round()  # many ties
    expected = np.mean([roc_auc_score(labels == c, scores[:, c]) for c in range(4)])
    assert tasks.macro_auc(scores, labels) == pytest.approx(expected)
    known = labels < 2  # only classes that occur count
    expected = np.mean([roc_auc_score(labels[known] == c, scores[known, c]) for c in range(2)])
    assert tasks.macro_auc(scores[known], labels[known]) == pytest.approx(expected)
    assert math.isnan(tasks.macro_auc(scores[:3], torch.zeros(3, dtype=torch.int64)))
    assert tasks.figures(scores, labels)["accuracy"] == float((scores.argmax(1) == labels).double().mean())
    assert "auc" not in tasks.figures(scores[:3], torch.zeros(3, dtype=torch.int64))


def test_shots_of_every_class() -> None:
    labels = torch.tensor([0] * 20 + [2] * 3 + [5] * 9)
    rows = tasks.few_shot_rows(labels, 4, seed=0, draw=0)
    assert torch.bincount(labels[rows]).tolist() == [4, 0, 3, 0, 0, 4]
    assert len(set(rows.tolist())) == len(rows)
    assert torch.equal(rows, tasks.few_shot_rows(labels, 4, seed=0, draw=0))
    assert not torch.equal(rows, tasks.few_shot_rows(labels, 4, seed=0, draw=1))


def test_the_decoder_learns_from_frozen_tokens() -> None:
    pair = build_pair(channels=1, image_size=(16, 16), mean=(0.5,), std=(0.5,), vocabulary=("a",), width=16).eval()
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    cells = torch.rand(40, 4, 4) < 0.3
    cells[:, 0, 0] = True
    masks = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = masks[:, None].float() + 0.1 * torch.randn(40, 1, 16, 16)
    labels = masks.long()
    labels[:, 15] = IGNORE

    def train_and_judge(epochs: int) -> dict[str, float]:
        decoder = train_decoder(pair, images[:32].split(10), labels[:32], 2, epochs=epochs, seed=0)
        batch = SimpleNamespace(inputs=images[32:], targets=labels[32:])
        return segmentation(decoder, SimpleNamespace(batches=lambda: [batch]))

    found = train_and_judge(25)
    assert found["dice"] > 0.7
    assert found["dice"] > train_and_judge(1)["dice"] + 0.1
    assert train_and_judge(1) == train_and_judge(1)
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())
    assert all(p.grad is None for p in pair.parameters())
