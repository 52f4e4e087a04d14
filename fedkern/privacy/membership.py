"""The loss-threshold membership-inference attack on a released model (Yeom et al., CSF 2018, arXiv 1709.01604).

Who trained on a record tends to lose less on it.  The attacker, given a record and the model, calls it a member where
the loss is below a threshold; over all thresholds that is a ROC curve, whose area says how well members can be told
from others (0.5: not at all) and whose true-positive rate at 1 % false positives says how well a few can be told for
sure (Carlini et al., arXiv 2112.03570).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

FALSE_POSITIVES = 0.01


@dataclass(frozen=True)
class Attack:
    """How well losses tell members from others.

    Attributes:
        auc: area under the ROC curve, ties counting half.
        low, high: its 95 % confidence interval, by DeLong's variance.
        tpr: share of the members called members where at most 1 % of the others are.
        members, others: how many records each.
    """

    auc: float
    low: float
    high: float
    tpr: float
    members: int
    others: int

    def to_dict(self) -> dict[str, float]:
        """Its attributes by name."""
        return asdict(self)


def membership_attack(members: Tensor, others: Tensor, *, confidence: float = 0.95) -> Attack:
    """The attack from the losses of records that were trained on and of records that were not.

    The interval is the normal approximation with the variance of DeLong, DeLong and Clarke-Pearson (Biometrics 1988),
    cut at 0 and 1.  It is about the choice of records from the same distribution; the model is taken as given.

    Args:
        members: losses fp ``[n]`` of training records, n >= 2.
        others: losses fp ``[m]`` of records that were never trained on, of the same distribution, m >= 2.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: fewer than two records of a kind, another shape, a NaN, or a confidence out of range.
    """
    from scipy.special import ndtri

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), not {confidence}")
    # A record with a lower loss is more likely a member.
    x, y = (-_checked(losses, name) for losses, name in ((members, "members"), (others, "others")))
    # Mean rank of each among the other kind: the share of the others that it beats, ties counting half.
    both, own_x, own_y = _midranks(np.concatenate([x, y])), _midranks(x), _midranks(y)
    beats = (both[: len(x)] - own_x) / len(y)
    beaten = 1 - (both[len(x) :] - own_y) / len(x)
    auc = float(beats.mean())
    deviation = math.sqrt(float(beats.var(ddof=1)) / len(x) + float(beaten.var(ddof=1)) / len(y))
    half = float(ndtri(0.5 + confidence / 2)) * deviation
    # The lowest threshold above which there are at most 1 % of the others.
    allowed = int(FALSE_POSITIVES * len(y))
    threshold = np.sort(y)[::-1][allowed]
    return Attack(
        auc=auc,
        low=max(0.0, auc - half),
        high=min(1.0, auc + half),
        tpr=float((x > threshold).mean()),
        members=len(x),
        others=len(y),
    )


def _checked(losses: Tensor, name: str) -> np.ndarray:
    if losses.dim() != 1 or len(losses) < 2:
        raise ValueError(f"{name} must be losses [n] of at least two records, not {list(losses.shape)}")
    values = losses.detach().cpu().double().numpy()
    if np.isnan(values).any():
        raise ValueError(f"{name} must not hold NaN")
    return values


def _midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, method="average"))
