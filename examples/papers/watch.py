"""Ten persons with a smartwatch do seven exercises: a person is a client.

``pip install --no-deps seglearn`` brings the recordings: ``data/watch_dataset.npy`` in its folder.  Person 10 never
trains in

    python -m fedkern.run ditto --data examples/papers/watch.py:watch --data-root FILE \\
        --model examples/papers/watch.py:network --held-out-client 10
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, TensorDataset

from fedkern import FederatedData

ARRAYS = {
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype",
    "_codecs.encode",
}  # fmt: skip


class ArraysOnly(pickle.Unpickler):
    """Reader of pickled arrays: a pickle that may name any class can run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ARRAYS:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module, name)


def watch(root: str) -> FederatedData:
    """Windows fp32 ``[6, 100]`` of two seconds with their exercise by person.

    The first half of every recording is for training, its last third is the person's test set, and the part between is
    for validation.

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
    parts: tuple[dict[str, list[TensorDataset]], ...] = ({}, {}, {})
    for person, exercise, recording in zip(*(recordings[name] for name in ("subject", "y", "X")), strict=True):
        for samples, part in zip(
            np.split(recording, [len(recording) // 2, len(recording) * 2 // 3]), parts, strict=True
        ):
            windows = torch.from_numpy(samples).float().unfold(0, 100, 50)
            part.setdefault(str(person), []).append(TensorDataset(windows, torch.full((len(windows),), int(exercise))))
    train, validation, test = ({person: ConcatDataset(sets) for person, sets in part.items()} for part in parts)
    data = FederatedData.from_datasets(train, test, validation=validation)
    homes = torch.repeat_interleave(torch.tensor([len(windows) for windows in validation.values()]))
    return replace(data, validation=replace(data.validation, homes=homes))  # a held-out person leaves it


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
