"""Figures of a network beside the task's, and class counts of a client (FedIOD, arXiv 2312.14478)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedkern.methods.protocol import Batch
from fedkern.methods.roles import Client, EvaluatedSet, TestSet
from fedkern.models import StagedNetwork, object_share
from fedkern.models.precision import compute_in


def class_counts(client: Client) -> Tensor:
    """Return the samples (segmentation: pixels) of every class, fp32 [C]."""
    return torch.bincount(client.labels[client.labels >= 0], minlength=len(client.classes)).float()


@compute_in("fp32")
def gradcam(network: nn.Module, sets: Mapping[str, EvaluatedSet], count: int) -> dict[str, float]:
    """Return the share of Grad-CAM mass inside the object, on ``count`` images of every set with masks."""
    metrics: dict[str, float] = {}
    if not count or not isinstance(network, StagedNetwork) or not network.maps:
        return metrics
    for prefix, data in sets.items():
        if prefix != "validation_" and getattr(data.split, "masks", None) is not None and bool(data.split.masks.any()):
            images: Any = data
            for name, value in object_share(network, images.masked_batches(count)).items():
                metrics[prefix + name] = float(value)
    return metrics


class _BatchAtHand:
    """Test set that remembers the targets of the current batch."""

    pool = None
    targets: Tensor

    def __init__(self, data: TestSet) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def batches(self) -> Iterator[Batch]:
        for batch in self._data.batches():
            self.targets = batch.targets
            yield batch


def with_accuracies(
    names: Sequence[str], answer: Callable[[Tensor], tuple[Tensor, Tensor]], data: TestSet
) -> dict[str, float]:
    """Return the task's figures of a network, and the accuracies of further predictions.

    ``answer`` returns the logits ``[B, C]`` of a batch's inputs, and further predictions ``[len(names), B]``.
    """
    test_set: Any = _BatchAtHand(data)
    right, total = torch.zeros(len(names), dtype=torch.int64), 0

    def call(inputs: Tensor) -> Tensor:
        nonlocal total
        logits, predictions = answer(inputs)
        right.add_((predictions == test_set.targets).sum(1).cpu())
        total += len(test_set.targets)
        return logits

    network: Any = call
    figures = data.task.figures(network, test_set)
    return {**figures, **dict(zip(names, (right.double() / total).tolist(), strict=True))}
