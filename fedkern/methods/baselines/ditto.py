"""Ditto (Li et al., ICML 2021, arXiv 2012.04221): personal networks that are regularised towards the global one.

Beside FedAvg's own training every client trains a network v_k of its own (algorithm 1), with w the network received:

    v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w))

v_k starts as the first network that the client received.  Both trainings take the run's local epochs and optimiser, in
random orders of their own.  The global network is FedAvg's, bit for bit, and so are the messages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedkern.methods.base import vectors_of
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.protocol import Message, Phase, Received
from fedkern.methods.registry import register
from fedkern.methods.roles import Client
from fedkern.methods.terms import Terms
from fedkern.models.transfer import fetch
from fedkern.typed_option import option


@register("ditto")
class Ditto(FedAvg):
    """Trains a personal network beside FedAvg at every client, pulled to the global one (arXiv 2012.04221)."""

    asks = frozenset({"loss"})
    memoryless = False

    @dataclass(frozen=True)
    class Options(FedAvg.Options):
        lam: float = option(1.0, "weight of the personal networks' proximal term", low=0, name="lambda")

    @property
    def takes_buffers(self) -> bool:
        return False  # the personal networks have running statistics of their own

    @property
    def takes_personal(self) -> bool:
        return False

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        received = message["parameters"].to(client.device)
        vectors = self.own_vectors(client, vectors_of(message))
        trained = client.train(self, replace(phase, exchange="own"), vectors, extras={"global": received})
        client.state["own"] = {name: fetch(value) for name, value in trained.items()}
        client.report["loss_own"] = client.report.pop("loss")
        return super().client_update(client, phase, message)

    def terms(self, received: Received) -> Terms | None:
        if not self.options.lam or "global" not in received.extras:
            return None
        return Terms(anchor=received.extras["global"], proximal=self.options.lam)

    def own_vectors(self, client: Client, message: Message) -> Message:
        return {**message, **client.state.get("own", {})}  # pooled statistics are the global network's
