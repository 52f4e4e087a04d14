"""FedPer (Arivazhagan et al., 2019, arXiv 1912.00818): shared base layers and a personal head."""

from __future__ import annotations

from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.registry import register


@register("fedper")
class FedPer(FedAvg):
    """FedAvg whose clients keep the network's last layer, or what --personal names, to themselves (arXiv 1912.00818).

    Clients train all layers together, as in the paper, and send the base layers alone.
    """

    asks = frozenset({"criterion"})
    memoryless = False
    asynchronous = False
    keeps_head = True

    @property
    def needs(self) -> str:
        return "features"
