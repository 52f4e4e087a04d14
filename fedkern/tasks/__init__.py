"""Tasks: what a run's networks learn, how they are judged, and what of it can be shown; a file each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedkern.tasks.base import Constant, Figures, Task
from fedkern.tasks.classification import CLASSIFICATION
from fedkern.tasks.multilabel import MULTILABEL
from fedkern.tasks.retrieval import RETRIEVAL
from fedkern.tasks.segmentation import SEGMENTATION

TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFICATION, MULTILABEL, SEGMENTATION, RETRIEVAL)}
"""Tasks by name."""


def task_of(labels: Tensor, texts: Any = None, pixels: Any = None) -> Task:
    """The task of samples of which nobody says it.

    Args:
        labels: ``[n]``, ``[n, L]`` for several labels a sample, or ``[n, H, W]`` for a class of every pixel.
        texts: the samples' texts, if they have some.
        pixels: anything but None where ``labels`` stand for classes of pixels.
    """
    if texts is not None:
        return RETRIEVAL
    if pixels is not None:
        return SEGMENTATION
    return {2: MULTILABEL, 3: SEGMENTATION}.get(labels.dim(), CLASSIFICATION)


__all__ = [
    "CLASSIFICATION", "MULTILABEL", "RETRIEVAL", "SEGMENTATION", "TASKS", "Constant", "Figures", "Task", "task_of",
]  # fmt: skip
