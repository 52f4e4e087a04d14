"""Grad-CAM's figure of a network on its test sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fedkern.models import StagedNetwork, object_share
from fedkern.models.precision import computing


@computing("fp32")
def gradcam(network: nn.Module, sets: Mapping[str, Any], count: int) -> dict[str, float]:
    """The share of Grad-CAM mass inside the object, on the first ``count`` images of every test set with masks."""
    metrics: dict[str, float] = {}
    if not count or not isinstance(network, StagedNetwork) or not network.maps:
        return metrics
    for prefix, data in sets.items():
        if prefix != "validation_" and getattr(data.split, "masks", None) is not None and bool(data.split.masks.any()):
            for name, value in object_share(network, data.masked_batches(count)).items():
                metrics[prefix + name] = float(value)
    return metrics
