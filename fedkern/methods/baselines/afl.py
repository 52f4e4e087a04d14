"""Agnostic federated learning: training for the worst mixture of clients."""

import math
from collections.abc import Iterator

from torch import Tensor, nn

from fedkern.methods.common.dro import LOSSES, Robust
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import Batch, Federation, Received, Round


@register("afl")
class AFL(Robust):
    """Client weights for the worst mixture of clients: agnostic federated learning (arXiv 1902.00146).

        min_theta max_{w in simplex} sum_k w_k L_k(theta)

    In the exchange ``update`` clients train as in FedAvg, and the server averages by w.  In the exchange ``losses``
    client k reports the loss l_k of the new model on samples that it holds out:

        w_k <- w_k exp(eta l_k), normalised

    Agnostic federated learning equals FedDRA with rho = infinity, one stage and no anchors.  `Robust`
    (fedkern/methods/common/dro.py) has the details of the losses and of ``dro_apply``.

    Differences from the paper:

    - Clients train whole rounds.  The paper takes one stochastic gradient a round.
    - The weights follow an exponentiated gradient.  The paper projects a gradient step onto the simplex.
    - Every client holds out samples for its loss and trains on the others.

    Source: Mohri et al., ICML 2019.
    """

    requires = frozenset({"loss"})
    asynchronous = False  # counts on whole rounds
    replayable = True

    @property
    def radius(self) -> float:
        return math.inf

    def rounds(self, federation: Federation) -> Iterator[Round]:
        for _ in range(federation.rounds):
            yield Round(exchanges=("update", LOSSES))

    def loss(self, model: nn.Module, batch: Batch, received: Received) -> Tensor:
        return self.scaled(batch.task.loss(model, batch), received)
