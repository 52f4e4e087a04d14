"""Tests of ordinal classes: the cumulative-link loss against its formula, figures against scikit-learn's, and runs."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, cohen_kappa_score, mean_absolute_error

import fedkern
from fedkern import UserError
from fedkern.methods import METHODS, Batch
from fedkern.tasks.ordinal import ORDINAL, CumulativeLink, quadratic_kappa

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
        "afl", "centralised", "ditto", "fedavg", "feddyn", "fedper", "fedprox", "local", "scaffold",
    ]  # fmt: skip
