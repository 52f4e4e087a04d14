"""FedProx (Li et al., 2020, arXiv 1812.06127)."""

from __future__ import annotations

from dataclasses import dataclass

from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.protocol import Received
from fedkern.methods.registry import register
from fedkern.methods.terms import Terms
from fedkern.typed_option import option


@register("fedprox")
class FedProx(FedAvg):
    """FedAvg with a proximal term mu/2 ||theta - theta_global||^2 on every client (arXiv 1812.06127)."""

    asks = frozenset({"loss"})
    asynchronous = True

    @dataclass(frozen=True)
    class Options(FedAvg.Options):
        mu: float = option(0.01, "weight of the proximal term", low=0)

    def terms(self, received: Received) -> Terms | None:
        return Terms(anchor=received.parameters, proximal=self.options.mu) if self.options.mu else None
