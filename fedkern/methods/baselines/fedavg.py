"""FedAvg: local training and a weighted average."""

from fedkern.methods.base import LocalTraining
from fedkern.methods.method_registry import register


@register("fedavg")
class FedAvg(LocalTraining):
    """Local training and a weighted average of the networks (arXiv 1602.05629).

    In a round with the participants S, client k has n_k samples and the mean loss L_k:

        theta_k = theta, trained on L_k
        theta   = sum_{k in S} a_k theta_k / sum_{k in S} a_k

    a_k is n_k with ``weighting=samples``, and 1 with ``weighting=uniform``.  `LocalTraining` says how buffers are
    averaged.

    Source: McMahan et al., AISTATS 2017, algorithm 1.
    """

    stateless = True
    asynchronous = True
    replayable = True
    requires = frozenset({"loss"})
