"""FedPer: shared base layers and a personal head."""

from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.method_registry import register


@register("fedper")
class FedPer(FedAvg):
    """FedAvg of the base layers, with a head that stays at every client (FedPer, arXiv 1912.00818).

    The network's last linear layer stays in the client's state.  All layers train together, as in the paper, and the
    base layers travel.  ``--personal 'layer3.*,head.*'`` names other parts.

    There is no global network: all figures are means over the clients' networks.  Every client starts from the head of
    the run's initial network.  Segmentation and image-text pairs have no last linear layer: take ``fedavg --personal``
    there, and name the parts.

    Source: Arivazhagan et al., 2019.
    """

    requires = frozenset({"criterion"})
    stateless = False
    asynchronous = False
    keeps_head = True

    @property
    def needs(self) -> str:
        return "features"
