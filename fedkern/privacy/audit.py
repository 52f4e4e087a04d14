"""Empirical lower bounds on what a private mechanism gives away, beside what the accountant claims.

A mechanism is mu-GDP (Dong, Roth and Su, "Gaussian differential privacy", JRSS B 2022, arXiv 1905.02383) if two
neighbouring data sets are as hard to tell apart by its release as N(0, 1) and N(mu, 1): every test has

    Phi^-1(1 - false positives) - Phi^-1(false negatives) <= mu.

The Gaussian mechanism of noise multiplier z is 1 / z-GDP and no better, and such mechanisms compose by the root of the
sum of squares.  An audit runs the mechanism many times on two neighbouring data sets, tests one score of the release
against a threshold, and turns upper confidence bounds on both error rates into a lower bound on mu (Nasr et al., "Tight
auditing of differentially private machine learning", USENIX Security 2023, arXiv 2302.07956).  A lower bound above the
claim is a defect; one below it proves nothing about the scores that were not tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedkern.privacy.accounting import DP_SGD, GAUSSIAN, Accountant

_CANDIDATES = 199
"""Thresholds that are tried, quantiles of the scores."""


@dataclass(frozen=True)
class Audit:
    """How well a threshold tells two neighbouring data sets apart.

    Attributes:
        lower: mu is at least this, with the confidence; 0 where nothing was told apart.
        false_positives, false_negatives: upper confidence bounds on the error rates of the threshold.
        repeats: runs on each of the two data sets, half of which chose the threshold.
        confidence: of ``lower``, over the noise of the runs.
    """

    lower: float
    false_positives: float
    false_negatives: float
    repeats: int
    confidence: float

    def to_dict(self) -> dict[str, float]:
        """Its attributes by name."""
        return asdict(self)


def audit(one: Tensor, other: Tensor, *, confidence: float = 0.99) -> Audit:
    """A lower bound on mu from the scores of independent runs on each of two neighbouring data sets.

    The first half of the runs chooses the threshold and the second half is counted, so that the choice costs no
    confidence.  Error rates are bounded by Clopper and Pearson (Biometrika 1934), each at half of what confidence
    leaves.  With n runs counted and no error at all the bound is ``-2 Phi^-1(1 - ((1 - confidence) / 2)^(1 / n))``,
    7.1 for 20,000 runs at 0.99: more cannot be shown.

    Args:
        one, other: scores fp ``[n]``, n >= 4, larger on the other data set if they tell anything; run i of one and run
            i of the other need not belong together.
        confidence: in (0, 1).

    Raises:
        ValueError: another shape, a NaN, or a confidence out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), not {confidence}")
    x, y = (_checked(scores, name) for scores, name in ((one, "one"), (other, "other")))
    if len(x) != len(y):
        raise ValueError(f"one and other must have the same number of runs, not {len(x)} and {len(y)}")
    half, each = len(x) // 2, (1 - confidence) / 2
    candidates = np.quantile(np.concatenate([x[:half], y[:half]]), np.linspace(0, 1, _CANDIDATES + 2)[1:-1])
    best = int(np.argmax(_mu(*_bounds(x[:half], y[:half], candidates, each))))
    (positives,), (negatives,) = _bounds(x[half:], y[half:], candidates[best : best + 1], each)
    lower = max(0.0, float(_mu(positives, negatives)))
    return Audit(lower, float(positives), float(negatives), len(x), confidence)


def claimed_mu(ledger: Mapping[str, Sequence[Sequence[Any]]], false_positives: float = 0.5) -> float:
    """The mu that a client's ledger admits, where one record is replaced.

    Without sampling all entries are Gaussian mechanisms and mu does not depend on the test.  With it the releases are
    not mu-GDP for the accountant: what it admits at a false-positive rate are the fewest false negatives that the pairs
    (epsilon, delta) on its curve allow (Kairouz, Oh and Viswanath, ICML 2015), and mu is that of such a test.

    Args:
        ledger: as :attr:`Accountant.state`.
        false_positives: of the test, in (0, 1); a bound from above on them does.

    Returns:
        0 where nothing was released, infinity where something was without noise.

    Raises:
        ValueError: the ledger has a kind of release that is not known here, or ``false_positives`` is out of range.
        UserError: something was sampled, and dp-accounting is not installed.
    """
    if not 0 < false_positives < 1:
        raise ValueError(f"false_positives must be in (0, 1), not {false_positives}")
    square, sampled = 0.0, False
    for rows in ledger.values():
        for kind, noise, rate, steps in rows:
            if kind not in (GAUSSIAN, DP_SGD):
                raise ValueError(f"releases must be {GAUSSIAN} or {DP_SGD}, not {kind}")
            # DP-SGD's noise is over the clipping norm, and a replaced gradient may turn around.
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


def _bounds(x: np.ndarray, y: np.ndarray, thresholds: np.ndarray, each: float) -> tuple[np.ndarray, np.ndarray]:
    """For every threshold, upper bounds on the rates of ``x`` above it and of ``y`` not above it."""
    positives = len(x) - np.searchsorted(np.sort(x), thresholds, side="right")
    return _most(positives, len(x), each), _most(np.searchsorted(np.sort(y), thresholds, side="right"), len(y), each)


def _most(errors: np.ndarray, runs: int, level: float) -> np.ndarray:
    """Clopper and Pearson's upper bounds on rates, each wrong with probability ``level``."""
    from scipy.special import betaincinv

    right = np.maximum(runs - errors, 1)
    return np.where(errors == runs, 1.0, betaincinv(errors + 1.0, right, 1 - level))


def _least_negatives(epsilon: Callable[[float], float], false_positives: float) -> float:
    """What (epsilon, delta) for every delta of a grid leaves: a test's fewest false negatives."""
    least = 0.0
    for delta in np.logspace(-8, math.log10(0.9), 60):
        bound = epsilon(float(delta))
        if math.isfinite(bound):
            rest = 1 - float(delta) - false_positives
            least = max(least, rest * math.exp(-bound), 1 - float(delta) - math.exp(min(bound, 50.0)) * false_positives)
    return least


def _checked(scores: Tensor, name: str) -> np.ndarray:
    if scores.dim() != 1 or len(scores) < 4:
        raise ValueError(f"{name} must be scores [n] of at least four runs, not {list(scores.shape)}")
    values = scores.detach().cpu().double().numpy()
    if np.isnan(values).any():
        raise ValueError(f"{name} must not hold NaN")
    return values
