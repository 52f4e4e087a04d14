"""FedAvg (McMahan et al., 2017, arXiv 1602.05629)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from fedkern.methods.base import Batch, LocalTraining, Received, register


@register("fedavg")
class FedAvg(LocalTraining):
    """Local SGD on the cross-entropy and a weighted average of the parameters (arXiv 1602.05629)."""

    def loss(self, model: Any, batch: Batch, received: Received) -> Tensor:
        return cross_entropy(model(batch.images), batch.labels)
