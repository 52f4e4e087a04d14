"""Empirical lower bounds on the privacy loss of a mechanism, to compare with the accountant's claim.

A mechanism is mu-GDP (Dong, Roth and Su, "Gaussian differential privacy", JRSS B 2022, arXiv 1905.02383) if its release
tells two neighbouring data sets apart no better than one sample tells N(0, 1) from N(mu, 1).  Every test then has

    Phi^-1(1 - false positives) - Phi^-1(false negatives) <= mu.

The Gaussian mechanism of noise multiplier z is 1 / z-GDP and no better.  The mu of several such mechanisms together is
the root of the sum of their squared mu.

An audit runs the mechanism many times on two neighbouring data sets and tests one score of the release against a
threshold.  Upper confidence bounds on both error rates give a lower bound on mu (Nasr et al., "Tight auditing of
differentially private machine learning", USENIX Security 2023, arXiv 2302.07956).  A lower bound above the claim shows
a defect.  A lower bound below the claim proves nothing about scores that were not tried.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedkern.privacy.accounting import DP_SGD, GAUSSIAN, Accountant

_CANDIDATES = 199
"""Number of thresholds that are tried, which are quantiles of the scores."""


@dataclass(frozen=True)
class Audit:
    """Result of a threshold test between two neighbouring data sets.

    Attributes:
        lower: lower bound on mu at this confidence; 0 where the data sets were not told apart.
        false_positives, false_negatives: upper confidence bounds on the error rates of the threshold.
        repeats: runs on each of the two data sets; the first half chose the threshold.
        confidence: confidence of ``lower``, over the noise of the runs.
    """

    lower: float
    false_positives: float
    false_negatives: float
    repeats: int
    confidence: float

    def to_dict(self) -> dict[str, float]:
        """Return the attributes by name."""
        return asdict(self)


def audit(one: Tensor, other: Tensor, *, confidence: float = 0.99) -> Audit:
    """Return a lower bound on mu from the scores of independent runs on each of two neighbouring data sets.

    The first half of the runs chooses the threshold and the second half is counted, so that the choice costs no
    confidence.  Clopper-Pearson bounds (Biometrika 1934) on the two error rates fail with probability
    ``(1 - confidence) / 2`` each.  The largest bound that n counted runs can show is that without any error,
    ``-2 Phi^-1(1 - ((1 - confidence) / 2)^(1 / n))``: 7.1 for 20,000 runs at 0.99.

    Args:
        one, other: scores fp ``[n]``, n >= 4, of the runs on each data set.  The test takes larger scores as a sign of
            the other data set.  Run i of one and run i of the other need not belong together.
        confidence: in (0, 1).

    Raises:
        ValueError: the scores have a wrong shape or a NaN, or the confidence is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), not {confidence}")
    x, y = (_check(scores, name) for scores, name in ((one, "one"), (other, "other")))
    if len(x) != len(y):
        raise ValueError(f"one and other must have the same number of runs, not {len(x)} and {len(y)}")
    half, level = len(x) // 2, (1 - confidence) / 2
    candidates = np.quantile(np.concatenate([x[:half], y[:half]]), np.linspace(0, 1, _CANDIDATES + 2)[1:-1])
    best = int(np.argmax(_mu(*_bounds(x[:half], y[:half], candidates, level))))
    (positives,), (negatives,) = _bounds(x[half:], y[half:], candidates[best : best + 1], level)
    lower = max(0.0, float(_mu(positives, negatives)))
    return Audit(lower, float(positives), float(negatives), len(x), confidence)


def claimed_mu(ledger: Mapping[str, Sequence[Sequence[Any]]], false_positives: float = 0.5) -> float:
    """Return the mu that a client's ledger claims, where one record is replaced.

    Without sampling all entries are Gaussian mechanisms, and mu does not depend on the test.  With sampling the
    accountant claims a curve of pairs (epsilon, delta) and no mu.  At a false-positive rate these pairs allow a certain
    fewest false negatives (Kairouz, Oh and Viswanath, ICML 2015).  The result is then the mu of a test with these two
    error rates.

    Args:
        ledger: as :attr:`Accountant.state`.
        false_positives: false-positive rate of the test, in (0, 1), or an upper bound on this rate.

    Returns:
        0 where nothing was released, infinity where a release had no noise.

    Raises:
        ValueError: the ledger has an unknown kind of release, or ``false_positives`` is out of range.
        UserError: a release was sampled, and dp-accounting is not installed.
    """
    if not 0 < false_positives < 1:
        raise ValueError(f"false_positives must be in (0, 1), not {false_positives}")
    square, sampled = 0.0, False
    for rows in ledger.values():
        for kind, noise, rate, steps in rows:
            if kind not in (GAUSSIAN, DP_SGD):
                raise ValueError(f"releases must be {GAUSSIAN} or {DP_SGD}, not {kind}")
            # DP-SGD's noise is over the clipping norm, and a replaced record may turn its clipped gradient around.
            change = 2.0 if kind == DP_SGD else 1.0
            square += (steps * (change / noise) ** 2 if noise else math.inf) if steps else 0.0
            sampled = sampled or rate < 1
    if not sampled:
        return math.sqrt(square)
    return float(_mu(false_positives, _least_negatives(Accountant(ledger).epsilon, false_positives)))


# -- one test ----------------------------------------------------------------------------------------------------------


def _mu(false_positives: Any, false_negatives: Any) -> Any:
    from scipy.special import ndtri

    return -ndtri(false_positives) - ndtri(false_negatives)


def _bounds(x: np.ndarray, y: np.ndarray, thresholds: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Return for every threshold upper bounds on the shares of ``x`` above the threshold and of ``y`` not above it."""
    positives = len(x) - np.searchsorted(np.sort(x), thresholds, side="right")
    return _most(positives, len(x), level), _most(np.searchsorted(np.sort(y), thresholds, side="right"), len(y), level)


def _most(errors: np.ndarray, runs: int, level: float) -> np.ndarray:
    """Return Clopper-Pearson upper bounds on error rates, each wrong with probability ``level``."""
    from scipy.special import betaincinv

    right = np.maximum(runs - errors, 1)
    return np.where(errors == runs, 1.0, betaincinv(errors + 1.0, right, 1 - level))


def _least_negatives(epsilon: Callable[[float], float], false_positives: float) -> float:
    """Return the fewest false negatives of a test that the pairs (epsilon, delta) allow, over a grid of delta."""
    limit = 0.0
    for delta in np.logspace(-8, math.log10(0.9), 60):
        bound = epsilon(float(delta))
        if math.isfinite(bound):
            left = 1 - float(delta) - false_positives
            limit = max(limit, left * math.exp(-bound), 1 - float(delta) - math.exp(min(bound, 50.0)) * false_positives)
    return limit


def _check(scores: Tensor, name: str) -> np.ndarray:
    if scores.dim() != 1 or len(scores) < 4:
        raise ValueError(f"{name} must be scores [n] of at least four runs, not {list(scores.shape)}")
    values = scores.detach().cpu().double().numpy()
    if np.isnan(values).any():
        raise ValueError(f"{name} must not hold NaN")
    return values
