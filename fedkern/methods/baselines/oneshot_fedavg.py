"""FedAvg with a single round."""

from fedkern.methods.common.oneshot import OneShot
from fedkern.methods.method_registry import register


@register("oneshot-fedavg")
class OneShotFedAvg(OneShot):
    """FedAvg with a single round: the whole local budget, then one weighted average (arXiv 1602.05629).

    With ``calibrate`` a second round trains the average's classifier anew (`CCVR`).

    Source: McMahan et al., AISTATS 2017, algorithm 1, with one round.
    """

    requires = frozenset({"classes"})
