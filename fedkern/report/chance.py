"""Main figures that need no learning, as a baseline of a run's figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fedkern.data import Split
from fedkern.engine.store.confusions import Confusions
from fedkern.methods.common.figures import MAIN_FIGURES
from fedkern.methods.common.final_figures import set_name
from fedkern.report.tables import split_metric


def constants(
    names: Iterable[str],
    tests: Mapping[str, Split],
    confusion: Confusions | None,
    metrics: Mapping[str, Any],
    classes: int,
) -> dict[str, float]:
    """The main figures that predicting one class everywhere gives, or for pairs picking at random.

    Those of ``names`` without a known constant are left out.  There are no ``tests`` where they are not known, or where
    their counts must not be told.  ``metrics`` have the numbers of candidates in retrieval.
    """
    found: dict[str, float] = {}
    for name in names:
        test_set, figure = split_metric(name, tests)
        split = tests.get(test_set)
        gallery = metrics.get(f"{test_set}_gallery" if test_set else "gallery")
        if figure == "accuracy":
            matrix = confusion.matrices.get(set_name(test_set)) if confusion is not None else None
            counts = np.zeros(0) if matrix is None else matrix.sum(1)
            if matrix is None and split is not None and split.labels.dim() == 1:
                counts = np.bincount(split.labels.numpy())
            if counts.sum():
                found[name] = float(counts.max() / counts.sum())
        elif figure == "dice" and split is not None:
            from fedkern.tasks.segmentation_figures import constant_dice

            found[name] = constant_dice(split.labels, classes, split.cases, split.full)[0]
        elif figure == "macro_auroc":
            found[name] = 0.5
        elif figure == "i2t_r1" and gallery:
            found[name] = 1 / gallery
    return found


def of_rounds(
    records: Iterable[Mapping[str, Any]], tests: Mapping[str, Split], confusion: Confusions | None, classes: int
) -> dict[str, float]:
    """:func:`constants` of all main figures in the records of a run's rounds."""
    every = {name: value for record in records for name, value in record.items()}
    names = [name for name in every if split_metric(name, tests)[1] in MAIN_FIGURES]
    return constants(names, tests, confusion, every, classes)
