"""Main figures that need no learning, as a baseline of a run's figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedkern.engine.store.confusions import Confusions
from fedkern.methods.common.final_figures import set_name
from fedkern.tasks import TASKS
from fedkern.tasks.figure_names import split_metric


def constants(
    records: Iterable[Mapping[str, Any]],
    main: str,
    known: Mapping[str, float | None],
    confusion: Confusions | None,
    classes: int,
) -> dict[str, float]:
    """The main figures in records that need no learning, such as those of predicting one class everywhere.

    Those without a known constant are left out.  ``known`` are constants by test set, of data whose counts may be told.
    The records have the numbers of candidates in retrieval.
    """
    metrics = {name: value for record in records for name, value in record.items()}
    tasks = [task for task in TASKS.values() if task.main == main]
    figures: dict[str, float] = {}
    for name, (test_set, figure) in ((name, split_metric(name, known)) for name in metrics if tasks):
        if figure != main:
            continue
        matrix = confusion.matrices.get(set_name(test_set)) if confusion is not None else None
        counts = None if matrix is None else matrix.sum(1)
        gallery = metrics.get(f"{test_set}_gallery" if test_set else "gallery", 0.0)
        value = tasks[0].chance(None, classes, counts=counts, candidates=gallery)
        value = known.get(test_set) if value is None else value
        if value is not None:
            figures[name] = value
    return figures
