"""Main figures that need no learning."""

import numpy as np
import torch

from fedkern.data import load
from fedkern.engine.store.confusions import Confusions
from fedkern.engine.store.data_facts import DataFacts
from fedkern.report import run_contents
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import load_data


def test_figures_of_a_prediction_that_is_always_the_same():
    data = load("digits", clients=2, seed=0, train_samples=60)
    labels = data.tests[""].labels
    share = int(torch.bincount(labels).max()) / len(labels)
    records = [{"accuracy": 0.5, "validation_accuracy": 0.4, "loss": 1.0}, {"far_recall": 0.7, "round": 2}]
    assert run_contents.constant_figures(records, "accuracy", DataFacts.of(data, private=False).chance, None, 10) == {
        "accuracy": share
    }
    pairs = [{"i2t_r1": 0.1, "gallery": 40.0, "unseen_i2t_r1": 0.1, "unseen_gallery": 20.0, "minority_i2t_r1": 0.6}]
    assert run_contents.constant_figures(pairs, "i2t_r1", {}, None, 0) == {"i2t_r1": 1 / 40, "unseen_i2t_r1": 1 / 20}
    assert run_contents.constant_figures([{"ood_macro_auroc": 0.6}], "macro_auroc", {}, None, 0) == {
        "ood_macro_auroc": 0.5
    }
    assert run_contents.constant_figures([{"score": 0.6}], "score", {}, None, 0) == {}  # of a task that nobody knows


def test_counts_of_a_confusion_matrix_come_first():
    matrices = {"test": np.array([[3, 0], [1, 0]]), "ood": np.array([[0, 0], [0, 0]])}
    records, counted = [{"accuracy": 1.0, "ood_accuracy": 1.0}], Confusions(("a", "b"), matrices)
    found = run_contents.constant_figures(records, "accuracy", {}, counted, 2)
    assert found == {"accuracy": 0.75}


def test_the_dice_of_one_class_everywhere():
    options = {"test_samples": 12}
    data = load_data(RunConfig.make("fedavg", data="segdigits", clients=2, train_samples=20, data_options=options))
    found = run_contents.constant_figures(
        [{"dice": 0.5}], "dice", DataFacts.of(data, private=False).chance, None, len(data.classes)
    )
    assert found.keys() == {"dice"}
    assert 0 < found["dice"] < 0.5
