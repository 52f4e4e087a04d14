"""Loss-threshold membership-inference attack on a released model (Yeom et al., CSF 2018, arXiv 1709.01604).

The attacker calls a record a member if its loss is below a threshold. All thresholds give a ROC curve: its area says
how well losses separate members from others (0.5: not at all), its true-positive rate at few false positives how many
members are found while hardly any other record is called a member (Carlini et al., arXiv 2112.03570).
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

FALSE_POSITIVES = 0.01
CONFIDENCE = 0.95
"""Confidence of the intervals."""
LEAST = 5
"""Least number of independent records, or groups of records, of each kind for an interval of the area."""


@dataclass(frozen=True)
class Attack:
    """Result of a membership attack.

    Attributes:
        auc: area under the ROC curve, ties counting half.
        low, high: its confidence interval; None with fewer than 5 groups of a kind.
        tpr: share of the members called members, at the highest threshold at which at most 1 % of the others are.
        tpr_low, tpr_high: Clopper-Pearson interval of ``tpr``, with the threshold taken as given.
        fpr: share of the others called members at that threshold: 0 with fewer than 100 others. This is the observed
            share, not a bound on the rate among further records.
        members, others: number of records of each kind.
        member_groups, other_groups: number of independent groups of each kind.
    """

    auc: float
    low: float | None
    high: float | None
    tpr: float
    tpr_low: float
    tpr_high: float
    fpr: float
    members: int
    others: int
    member_groups: int
    other_groups: int

    def to_dict(self) -> dict[str, float | None]:
        """Return the attributes by name."""
        return asdict(self)


def membership_attack(members: Tensor, others: Tensor, *, groups: tuple[Tensor, Tensor] | None = None) -> Attack:
    """Attack a model by the losses of training records and of records that were not trained on.

    The interval of the area takes, on each side, the wider limit of two intervals:

    * An interval on the logit scale with the variance of DeLong, DeLong and Clarke-Pearson (Biometrics 1988), or with
      groups its extension to clusters by Obuchowski (Biometrics 1997).
    * Newcombe's score interval (method 5, Statistics in Medicine 2006), with groups at Kish's effective numbers of
      records. This interval has a width where the first has none: at an area of 0 or 1, and where all losses tie.

    Both intervals are about the choice of records from the same distribution; the model is taken as given.

    Args:
        members: losses fp ``[n]`` of training records, n >= 2.
        others: losses fp ``[m]`` of records that were never trained on, of the same distribution, m >= 2.
        groups: int64 ``[n]`` and ``[m]``, the group of every record. Records of one group number, members or others,
            depend on each other. None: every record is independent of all others.

    Raises:
        ValueError: there are fewer than two records of a kind, or an argument has a wrong shape or a NaN.

    Example:
        >>> attack = membership_attack(torch.tensor([0.1, 0.2, 0.4]), torch.tensor([0.3, 0.5, 0.6, 0.7]))
        >>> round(attack.auc, 2)
        0.92
    """
    from scipy.special import ndtri
    from scipy.stats import rankdata

    # A record with a lower loss is more likely a member.
    x, y = (-_check_losses(losses, name) for losses, name in ((members, "members"), (others, "others")))
    owners = (np.arange(len(x)), np.arange(len(y)) + len(x)) if groups is None else _owners(groups, len(x), len(y))
    sizes = [counts[counts > 0] for counts in (np.bincount(numbers) for numbers in owners)]
    # Kish: the number of independent records that grouped records are worth if they agree within their group.
    effective = [float(counts.sum() ** 2 / (counts**2).sum()) for counts in sizes]
    # For each record the share of the other kind that it beats, ties counting half, from its mean rank.
    ranks, own_x, own_y = (rankdata(values) for values in (np.concatenate([x, y]), x, y))
    beats = (ranks[: len(x)] - own_x) / len(y)
    beaten = 1 - (ranks[len(x) :] - own_y) / len(x)
    auc = float(beats.mean())
    low, high = None, None
    if min(len(counts) for counts in sizes) >= LEAST:
        z = float(ndtri(0.5 + CONFIDENCE / 2))
        deviation = math.sqrt(_variance(beats - auc, beaten - auc, *owners))
        limits = [_score_limit(auc, edge, z, *effective) for edge in (0.0, 1.0)]
        if 0 < auc < 1:
            middle, half = math.log(auc / (1 - auc)), z * deviation / (auc * (1 - auc))
            limits += [(1 + math.tanh((middle + side) / 2)) / 2 for side in (-half, half)]
        low, high = min(limits), max(limits)
    # The lowest threshold above which there are at most 1 % of the others.
    threshold = np.sort(y)[::-1][int(FALSE_POSITIVES * len(y))]
    tpr = float((x > threshold).mean())
    tpr_low, tpr_high = _clopper_pearson(tpr, effective[0])
    return Attack(
        auc=auc, low=low, high=high, tpr=tpr, tpr_low=tpr_low, tpr_high=tpr_high, fpr=float((y > threshold).mean()),
        members=len(x), others=len(y), member_groups=len(sizes[0]), other_groups=len(sizes[1]),
    )  # fmt: skip


def _variance(beats: np.ndarray, beaten: np.ndarray, members: np.ndarray, non_members: np.ndarray) -> float:
    """Return Obuchowski's variance of the area (DeLong's if each group is one record)."""
    count = max(int(members.max()), int(non_members.max())) + 1
    a, b = np.bincount(members, beats, count) / len(beats), np.bincount(non_members, beaten, count) / len(beaten)
    of_a, of_b = (len(np.unique(numbers)) for numbers in (members, non_members))
    group_count = len(np.union1d(members, non_members))
    together = 2 * group_count / (group_count - 1) * (a * b).sum()  # groups with records of both kinds
    return max(0.0, float(of_a / (of_a - 1) * (a * a).sum() + of_b / (of_b - 1) * (b * b).sum() + together))


def _score_limit(auc: float, edge: float, z: float, m: float, n: float) -> float:
    """Return the area between ``auc`` and ``edge`` that is z standard errors (Hanley-McNeil, m and n records) off."""
    near, far = auc, edge
    spread = (m + n) / 2 - 1
    for _ in range(60):
        area = (near + far) / 2
        variance = area * (1 - area) * (1 + spread * ((1 - area) / (2 - area) + area / (1 + area))) / (m * n)
        if (area - auc) ** 2 <= z * z * variance:
            near = area
        else:
            far = area
    return far


def _clopper_pearson(share: float, count: float) -> tuple[float, float]:
    """Return the exact binomial interval (Biometrika 1934) of a share."""
    from scipy.special import betaincinv

    hits, tail = share * count, (1 - CONFIDENCE) / 2
    low = float(betaincinv(hits, count - hits + 1, tail)) if share > 0 else 0.0
    return low, float(betaincinv(hits + 1, count - hits, 1 - tail)) if share < 1 else 1.0


def _owners(groups: tuple[Tensor, Tensor], members: int, non_members: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the group numbers of members and of others, counted from 0."""
    for group, count, name in zip(groups, (members, non_members), ("members", "others"), strict=True):
        if tuple(group.shape) != (count,) or group.is_floating_point():
            raise ValueError(f"groups must be integers [{count}] for the {name}, not {group.dtype} {list(group.shape)}")
    numbers = np.unique(np.concatenate([group.cpu().numpy() for group in groups]), return_inverse=True)[1]
    return numbers[:members], numbers[members:]


def _check_losses(losses: Tensor, name: str) -> np.ndarray:
    if losses.dim() != 1 or len(losses) < 2:
        raise ValueError(f"{name} must be losses [n] of at least two records, not {list(losses.shape)}")
    values = losses.detach().cpu().double().numpy()
    if np.isnan(values).any():
        raise ValueError(f"{name} must not hold NaN")
    return values
