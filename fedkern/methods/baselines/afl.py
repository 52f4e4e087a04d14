"""Agnostic federated learning (Mohri et al., ICML 2019, arXiv 1902.00146): the worst of all mixtures of clients.

The set of client weights is the whole simplex, where the nearest point of an exponentiated step is the step itself.
Against the paper's one stochastic gradient a round, clients train as in FedAvg and the weights are those of the
average; the paper's projected gradient on the weights is here the exponentiated one, as in FedDRA, of which this is
rho = infinity with one stage and no anchors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedkern.methods.base import Batch, Federation, Received, Round, register
from fedkern.methods.common.robust import LOSSES, Robust
from fedkern.methods.common.supervised import supervised_loss


@register("afl")
class AFL(Robust):
    """Weighs clients for the worst of all their mixtures: agnostic federated learning (arXiv 1902.00146)."""

    tasks: ClassVar[tuple[str, ...]] = ("classification", "retrieval")

    @dataclass(frozen=True)
    class Options(Robust.Options):
        """Knobs of the client weights."""

    @property
    def radius(self) -> float:
        return math.inf

    def rounds(self, federation: Federation) -> Iterator[Round]:
        for _ in range(federation.rounds):
            yield Round(exchanges=("update", LOSSES))

    def loss(self, model: Any, batch: Batch, received: Received) -> Tensor:
        return self.scaled(supervised_loss(model, batch), received)
