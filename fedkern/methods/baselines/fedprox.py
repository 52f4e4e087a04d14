"""FedProx: FedAvg with a proximal term."""

from dataclasses import dataclass

from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import Received
from fedkern.methods.terms import Terms
from fedkern.typed_option import option


@register("fedprox")
class FedProx(FedAvg):
    """FedAvg with a proximal term on every client (arXiv 1812.06127).

        L_k(theta) + mu/2 ||theta - theta_received||^2

    ``mu=0`` is FedAvg.  The term acts on parameters, not on running statistics.

    In the paper clients do unequal work, in partial epochs.  Here they do equal work, unless ``--straggler-rate`` slows
    some of them.

    Source: Li et al., MLSys 2020, equation 2.
    """

    requires = frozenset({"loss"})
    asynchronous = True

    @dataclass(frozen=True)
    class Options(FedAvg.Options):
        mu: float = option(0.01, "weight of the proximal term", low=0)

    def terms(self, received: Received) -> Terms | None:
        return Terms(anchor=received.parameters, proximal=self.options.mu) if self.options.mu else None
