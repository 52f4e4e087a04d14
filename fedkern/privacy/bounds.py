"""Epsilon of Gaussian releases at one delta, one record replaced: the least of several valid bounds.

    exact   all data: together one Gaussian mechanism, whose curve is known (Balle and Wang, ICML 2018)
    PLD     all data, and Poisson-sampled: privacy loss distributions, rounded up (Doroshenko et al., PETS 2022), of
            q N(-1, s^2) + (1 - q) N(0, s^2) against q N(1, s^2) + (1 - q) N(0, s^2)
    RDP     all data, and n shards in m without replacement: Renyi differential privacy (Mironov, CSF 2017; Wang, Balle
            and Kasiviswanathan, AISTATS 2019)
            Poisson-sampled, a record added or removed: a replacement is one removal and one addition, which turns
            (epsilon, delta) into (2 epsilon, (1 + exp(epsilon)) delta)

Releases that no accountant supports together share delta (basic composition). The splits of delta do not depend on
data, so the least bound is valid.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from types import ModuleType
from typing import Any

from fedkern.process.extras import import_extra

GAUSSIAN, DP_SGD = "gaussian", "dp-sgd"
SPLITS = (0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99)
"""Shares of delta to try if two accountants have to divide it."""
TYPICAL = 1e-5
"""The delta of a rough epsilon of the releases: by RDP, one record added or removed."""
LARGEST = 100.0
"""Largest rough epsilon for which PLD is tried: a larger epsilon promises nothing either way."""
_MOST_SHARDS = 1 << 20  # two shares of so many shards differ by more than a float64 is rounded
FINENESS = 2e-4
"""Bin width of PLD's privacy losses over the rough epsilon, so that time and memory hardly depend on epsilon."""


@dataclass(frozen=True)
class Entry:
    """Equal releases.

    Attributes:
        kind: ``GAUSSIAN``, whose sensitivity is the change by a replaced record, or ``DP_SGD``, by an added record,
            half as large.
        noise: standard deviation of the noise over this sensitivity.
        rate: shards drawn over all shards, or the probability that a record is in a batch.
    """

    kind: str
    noise: float
    rate: float
    steps: int


Entries = tuple[Entry, ...]


def need_accounting() -> ModuleType:
    """Return the module ``dp_accounting``.

    Raises:
        UserError: it is not installed.
    """
    return import_extra("Privacy accounting needs dp-accounting", "privacy", "dp_accounting", "dp_accounting.rdp")


def bound_replaced(entries: Entries, delta: float) -> float:
    """Return the epsilon of all releases, one record replaced (infinite without noise)."""
    entries = tuple(entry for entry in entries if entry.steps)
    if not entries:
        return 0.0
    need_accounting()
    if any(entry.noise == 0 for entry in entries):
        return math.inf
    sampled = tuple(entry for entry in entries if entry.kind == DP_SGD)
    unsampled = tuple(entry for entry in entries if entry.kind == GAUSSIAN and entry.rate == 1)
    shards = tuple(entry for entry in entries if entry.kind == GAUSSIAN and entry.rate < 1)
    bounds = []
    if not sampled:
        bounds.append(_rdp(shards + unsampled, "REPLACE_ONE", delta))
    if not shards:
        bounds.append(_together(unsampled, sampled, delta))
    for share in SPLITS if shards and (unsampled or sampled) else ():
        left, right = share * delta, (1 - share) * delta
        bounds.append(_rdp(shards, "REPLACE_ONE", left) + _together(unsampled, sampled, right))
        if sampled and unsampled:
            bounds.append(bound_replaced(shards + unsampled, left) + _together((), sampled, right))
    return min(bounds)


def added_or_removed(entries: Entries, delta: float) -> float:
    """Return the epsilon of DP-SGD by RDP, one record added or removed, as libraries quote it."""
    return _rdp(entries, "ADD_OR_REMOVE_ONE", delta)


# -- exact, and by privacy loss distributions --------------------------------------------------------------------------


def _together(unsampled: Entries, sampled: Entries, delta: float) -> float:
    if not sampled:
        return _exact(unsampled, delta)
    bounds = [_losses(unsampled, sampled, delta)]
    if not unsampled:
        bounds.append(_hop(sampled, delta))
    else:
        bounds += [_exact(unsampled, s * delta) + _hop(sampled, (1 - s) * delta) for s in SPLITS]
    return min(bounds)


def _exact(unsampled: Entries, delta: float) -> float:
    """Return the epsilon of Gaussian releases of noise z_i, together one of noise (sum of z_i^-2)^-1/2."""
    if not unsampled:
        return 0.0
    noise = math.fsum(entry.steps / entry.noise**2 for entry in unsampled) ** -0.5
    return float(need_accounting().get_epsilon_gaussian(noise, delta)) + 1e-11  # the root is known to 1e-12


def _losses(unsampled: Entries, sampled: Entries, delta: float) -> float:
    """Return the epsilon by PLD, infinite if not tried or unsupported."""
    rough = added_or_removed(sampled, TYPICAL) + _exact(unsampled, TYPICAL)
    if not rough < LARGEST:
        return math.inf
    steps = sum(entry.steps for entry in sampled)  # rounding error grows with the steps and the bin width squared
    width = max(rough * min(FINENESS, 100 * FINENESS / math.sqrt(steps)), 1e-7)
    width = 2.0 ** math.ceil(math.log2(width))  # the same for every split of delta
    accountant = _distribution(unsampled, sampled, width)
    return math.inf if accountant is None else float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=16)
def _distribution(unsampled: Entries, sampled: Entries, width: float) -> Any:
    dp = need_accounting()
    import dp_accounting.pld

    relation = dp.NeighboringRelation.REPLACE_ONE
    accountant = dp_accounting.pld.PLDAccountant(neighboring_relation=relation, value_discretization_interval=width)
    # The library's sensitivity is the change by an added record: half of the change by a replaced record.
    events = [(dp.GaussianDpEvent(2 * entry.noise), entry.steps) for entry in unsampled]
    events += [(dp.PoissonSampledDpEvent(e.rate, dp.GaussianDpEvent(e.noise)), e.steps) for e in sampled]
    if not all(accountant.supports(event) for event, _ in events):
        return None
    for event, steps in events:
        accountant.compose(event, steps)
    return accountant


# -- by Renyi differential privacy -------------------------------------------------------------------------------------


def _rdp(entries: Entries, relation: str, delta: float) -> float:
    if not entries:
        return 0.0
    curves = [_curve(replace(entry, steps=1), relation) for entry in entries]
    total = sum(entry.steps * curve for entry, (_, curve) in zip(entries, curves, strict=True))
    return float(need_accounting().rdp.compute_epsilon(curves[0][0], total, delta)[0])


@functools.lru_cache(maxsize=256)
def _curve(entry: Entry, relation: str) -> tuple[Any, Any]:
    """Return the library's orders, and one release's Renyi divergences, which add up over releases.

    Cached: a curve takes tenths of a second.
    """
    dp = need_accounting()
    accountant = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation[relation])
    event = dp.GaussianDpEvent(entry.noise)
    if entry.kind == DP_SGD:
        event = dp.PoissonSampledDpEvent(entry.rate, event)
    elif entry.rate < 1:
        share = Fraction(entry.rate).limit_denominator(_MOST_SHARDS)
        event = dp.SampledWithoutReplacementDpEvent(share.denominator, share.numerator, event)
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # hides warnings of left-out orders: without these epsilon is no smaller
    try:
        accountant.compose(event)
    finally:
        log.setLevel(level)
    return accountant.orders, accountant.rdp


def _hop(sampled: Entries, delta: float) -> float:
    """Return the epsilon of DP-SGD, one record replaced, by one removal and one addition."""

    def fits(logarithm: float) -> bool:
        inner = added_or_removed(sampled, math.exp(logarithm))
        return math.isfinite(inner) and logarithm + inner + math.log1p(math.exp(-inner)) <= math.log(delta)

    # The largest inner delta with (1 + exp(inner epsilon)) inner delta <= delta, by bisection over its logarithm.
    low, high = math.log(delta) - 200.0, math.log(delta)
    if not fits(low):
        return math.inf
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 2 * added_or_removed(sampled, math.exp(low))
