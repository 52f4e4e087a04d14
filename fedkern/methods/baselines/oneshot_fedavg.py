"""One-shot FedAvg (McMahan et al., 2017, arXiv 1602.05629, with a single round)."""

from __future__ import annotations

from fedkern.methods.common.oneshot import OneShot
from fedkern.methods.registry import register


@register("oneshot-fedavg")
class OneShotFedAvg(OneShot):
    """FedAvg with a single round: the whole local budget, then one weighted average (arXiv 1602.05629)."""

    asks = frozenset({"classes"})
