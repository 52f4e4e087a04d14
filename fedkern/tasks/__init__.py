"""Tasks: losses, figures and pictures."""

import numpy as np
from torch import Tensor

from fedkern.tasks.classification import CLASSIFICATION as CLASSIFICATION
from fedkern.tasks.multilabel import MULTILABEL as MULTILABEL
from fedkern.tasks.ordinal import ORDINAL as ORDINAL
from fedkern.tasks.retrieval import RETRIEVAL as RETRIEVAL
from fedkern.tasks.segmentation import SEGMENTATION as SEGMENTATION
from fedkern.tasks.task import Constant as Constant
from fedkern.tasks.task import Figures as Figures
from fedkern.tasks.task import Task as Task
from fedkern.tasks.user_tasks import OwnClassification as OwnClassification
from fedkern.tasks.user_tasks import OwnTask as OwnTask

TASKS: dict[str, Task] = {task.name: task for task in list(globals().values()) if isinstance(task, Task)}
"""Tasks by name."""


def task_named(name: str) -> Task:
    """Return the built-in task of this name, or a plain user-defined task."""
    return TASKS.get(name, OwnTask())


def task_of(labels: Tensor | np.ndarray, texts: object = None, pixels: object = None, said: str = "auto") -> Task:
    """Return the task of samples, or raise ValueError for a task that does not fit.

    Args:
        labels: ``[n]``, ``[n, L]`` for several labels a sample, or ``[n, H, W]`` for a class of every pixel.
        texts: the samples' texts, or None.
        pixels: anything but None if ``labels`` stand for classes of pixels.
        said: a task's name, or ``"auto"``.
    """
    usual = {2: MULTILABEL, 3: SEGMENTATION}.get(labels.ndim, CLASSIFICATION)
    usual = RETRIEVAL if texts is not None else usual if pixels is None else SEGMENTATION
    able = {"auto": usual, **{name: task for name, task in TASKS.items() if task.target == usual.target}}
    if said not in [*able]:  # a list: a user's value may not be hashable
        words = ", ".join(f'"{name}"' for name in able if name != "auto")
        raise ValueError(f"task must be {words}, or left out, for labels {[*labels.shape]}, not {said!r}")
    return able[said]
