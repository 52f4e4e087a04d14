"""Evaluation of the global network on the named test sets."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedkern import models
from fedkern.engine.samples import TestSet
from fedkern.methods.base import Method


def test_sets(bench: Any) -> dict[str, TestSet]:
    """The test sets by metric prefix (``""``, ``"id_"``, ``"ood_"``), and ``"validation_"``."""
    data = bench.data
    splits = {f"{name}_" if name else "": split for name, split in data.tests.items()}
    if len(data.validation):
        splits["validation_"] = data.validation
    return {prefix: TestSet(split, data.mean, data.std, bench.device, bench.cache) for prefix, split in splits.items()}


def evaluate(method: Method, network: nn.Module, sets: dict[str, TestSet]) -> dict[str, float]:
    """The method's figures on every set, names prefixed: ``id_accuracy``, ``ood_loss``, ``validation_accuracy`` ..."""
    metrics: dict[str, float] = {}
    for prefix, data in sets.items():
        for name, value in method.evaluate(network, data).items():
            metrics[prefix + name] = float(value)
    return metrics


def gradcam(network: nn.Module, sets: dict[str, TestSet], count: int) -> dict[str, float]:
    """The share of Grad-CAM mass inside the object, on the first ``count`` images of every test set with masks."""
    metrics: dict[str, float] = {}
    if not count or not isinstance(network, models.StagedNetwork):
        return metrics
    for prefix, data in sets.items():
        if prefix != "validation_" and data.split.masks is not None and bool(data.split.masks.any()):
            for name, value in models.object_share(network, data.masked_batches(count)).items():
                metrics[prefix + name] = float(value)
    return metrics
