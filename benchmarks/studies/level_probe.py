"""Linear probes: how much of the class a logistic regression reads from every level of a finished run's model."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkern import models
from fedkern.data import normalise
from fedkern.downstream.saved_network import read_model
from fedkern.models.blocks import cut
from fedkern.models.fused import FusedNetwork
from fedkern.settings.run_data import kept_data, load_data
from fedkern.settings.stored import load_settings

if find_spec("sklearn") is None:  # said before the study's runs, not after them
    raise SystemExit("The linear probes of study_fusefl need scikit-learn: pip install scikit-learn.")

Levels = Callable[[Tensor], list[Tensor]]


def probe(folder: Path, blocks: int, *, batch: int = 500) -> list[float]:
    """The test accuracy of a logistic regression on each level's features.

    Features are averaged over positions and, where there are several clients' networks, over these; the regression sees
    all clients' training images, standardised features, no augmentation.

    Args:
        folder: a finished run.
        blocks: levels to cut an ordinary network (or every member of an ensemble) into.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    config = load_settings(folder)
    network, about = read_model(folder)
    data = kept_data(config, load_data(config))
    levels = level_features(network, blocks)

    def features(images: Tensor) -> list[np.ndarray]:
        parts: list[list[Tensor]] = []
        with torch.no_grad():
            for part in images.split(batch):
                parts.append(levels(normalise(part, about["mean"], about["std"], channels_last=True)))
        return [torch.cat(level).numpy() for level in zip(*parts, strict=True)]

    test = data.tests[""]
    train_labels = torch.cat([client.labels for client in data.clients]).numpy()
    train = features(torch.cat([client.images for client in data.clients]))
    accuracies = []
    for level, other in zip(train, features(test.images), strict=True):
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        accuracies.append(float(regression.fit(level, train_labels).score(other, test.labels.numpy())))
    return accuracies


def fused_features(network: FusedNetwork, x: Tensor) -> list[Tensor]:
    """Every level's features, averaged over positions and clients, ``[B, c_l]``."""
    result = []
    for level in network.levels:
        x = level(x)
        pooled = x.flatten(2).mean(2) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x
        result.append(pooled.unflatten(1, (level.count, -1)).mean(1))
    return result


def level_features(network: Any, blocks: int) -> Levels:
    """A function from images to every level's features ``[B, c_l]``."""
    if isinstance(network, FusedNetwork):
        return lambda x: fused_features(network, x)
    members = network.members if isinstance(network, models.Ensemble) else [network]
    parts = [cut(member, blocks) for member in members]

    def levels(x: Tensor) -> list[Tensor]:
        each = []
        for part in parts:
            h, means = x, []
            for block in part.blocks:
                h = block(h)
                means.append(h.flatten(2).mean(2) if h.dim() == 4 else h)
            each.append(means)
        return [torch.stack(level).mean(0) for level in zip(*each, strict=True)]

    return levels
