"""Ten persons with a smartwatch do seven exercises: a person is a client.

``pip install --no-deps seglearn`` brings the recordings: ``data/watch_dataset.npy`` in its folder.  Person 10 never
trains in

    python -m fedkern.run ditto --data examples/papers/watch.py:watch --data-root FILE \\
        --model examples/papers/watch.py:network --held-out-client 10
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

ARRAYS = {
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype",
    "_codecs.encode",
}  # fmt: skip
Persons = dict[str, ConcatDataset[tuple[torch.Tensor, ...]]]


class ArraysOnly(pickle.Unpickler):
    """Reader of pickled arrays: a pickle that may name any class can run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ARRAYS:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module, name)


def watch(root: str) -> tuple[Persons, Persons]:
    """Windows fp32 ``[6, 100]`` of two seconds with their exercise by person.

    The last third of every recording is the person's test set.

    Args:
        root: the file or its folder.  The file holds a dict with ``X``, arrays ``[samples, 6]`` of 50 a second, ``y``
            and ``subject``.

    Raises:
        pickle.UnpicklingError: the file holds more than arrays.
    """
    path = Path(root)
    with (path / "watch_dataset.npy" if path.is_dir() else path).open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        recordings = ArraysOnly(file, encoding="latin1").load().item()
    train: dict[str, list[Dataset[tuple[torch.Tensor, ...]]]] = {}
    test: dict[str, list[Dataset[tuple[torch.Tensor, ...]]]] = {}
    for person, exercise, recording in zip(*(recordings[name] for name in ("subject", "y", "X")), strict=True):
        for part, kept in zip(np.split(recording, [len(recording) * 2 // 3]), (train, test), strict=True):
            windows = torch.from_numpy(part).float().unfold(0, 100, 50)
            kept.setdefault(str(person), []).append(TensorDataset(windows, torch.full((len(windows),), int(exercise))))
    joined = [{person: ConcatDataset(parts) for person, parts in kept.items()} for kept in (train, test)]
    return joined[0], joined[1]


def network() -> nn.Module:
    """Return two convolutions over time and a linear head."""
    return nn.Sequential(
        nn.Conv1d(6, 32, 9, 2),
        nn.ReLU(),
        nn.Conv1d(32, 64, 9, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, 7),
    )
