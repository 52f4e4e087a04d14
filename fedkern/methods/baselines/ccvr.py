"""CCVR (Luo et al., 2021, arXiv 2106.05001) after a single round of FedAvg.

Heterogeneous data harm the classifier more than the features.  So clients send, per class, the count, mean and
covariance of the averaged network's features.  The server trains only the classifier, on virtual features drawn from
one Gaussian per class.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedkern.methods.baselines.oneshot_fedavg import OneShotFedAvg
from fedkern.methods.registry import register
from fedkern.typed_option import option


@register("ccvr")
class CCVR(OneShotFedAvg):
    """One-shot FedAvg with its classifier calibrated on virtual features (CCVR, arXiv 2106.05001)."""

    asks = frozenset({"classes", "features"})

    @dataclass(frozen=True)
    class Options(OneShotFedAvg.Options):
        """Options of one-shot FedAvg, with calibration by default."""

        calibrate: bool = option(True, "train the classifier anew on features drawn from class statistics (CCVR)")
