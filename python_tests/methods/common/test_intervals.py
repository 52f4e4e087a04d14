"""Intervals: resampled figures are those of the drawn samples, and the interval has its coverage."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from fedkern.engine.figures.intervals import _counts, intervals, wilson
from fedkern.tasks import TASKS
from fedkern.tasks.multilabel import label_figures
from fedkern.tasks.segmentation import case_dice

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
