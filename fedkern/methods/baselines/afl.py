"""Agnostic federated learning (Mohri et al., ICML 2019, arXiv 1902.00146): training for the worst mixture of clients.

The set of client weights is the whole simplex, so an exponentiated step needs no projection.  Two things differ from
the paper.  Clients train as in FedAvg, instead of one stochastic gradient a round, and the client weights are the
weights of the average.  The weights take an exponentiated step, as in FedDRA, instead of a projected gradient step.
AFL equals FedDRA with rho = infinity, one stage and no anchors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fedkern.methods.common.dro import LOSSES, Robust
from fedkern.methods.protocol import Batch, Federation, Received, Round
from fedkern.methods.registry import register


@register("afl")
class AFL(Robust):
    """Weighs clients for the worst of all their mixtures: agnostic federated learning (arXiv 1902.00146)."""

    asks = frozenset({"loss"})
    asynchronous = False  # counts on whole rounds
    replayable = True

    @property
    def radius(self) -> float:
        return math.inf

    def rounds(self, federation: Federation) -> Iterator[Round]:
        for _ in range(federation.rounds):
            yield Round(exchanges=("update", LOSSES))

    def loss(self, model: Any, batch: Batch, received: Received) -> Tensor:
        return self.scaled(batch.task.loss(model, batch), received)
