"""FedAvg (McMahan et al., 2017, arXiv 1602.05629)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedkern.methods.base import LocalTraining
from fedkern.methods.protocol import Batch, Received
from fedkern.methods.registry import register


@register("fedavg")
class FedAvg(LocalTraining):
    """Local SGD on the cross-entropy and a weighted average of the parameters (arXiv 1602.05629)."""

    memoryless = True
    asynchronous = True
    replayable = True
    asks = frozenset({"loss"})

    def loss(self, model: Any, batch: Batch, received: Received) -> Tensor:
        return batch.task.loss(model, batch)
