"""Epsilon of everything that one client has released, channel by channel, by Google's dp-accounting.

Two data sets are neighbours here where one record is *replaced*, which keeps the number of records public.  Gaussian
releases are composed in Renyi differential privacy (Mironov, CSF 2017), those of one shard in m with the bound for
sampling without replacement (Wang, Balle and Kasiviswanathan, AISTATS 2019).  DP-SGD (arXiv 1607.00133) is accounted as
its Poisson-sampled Gaussian where one record is added or removed; a replacement is one removal and one addition, which
makes (epsilon, delta) to (2 epsilon, (1 + exp(epsilon)) delta).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedkern.errors import UserError

GAUSSIAN, DP_SGD = "gaussian", "dp-sgd"
_EXACT = 1e-3  # relative width at which a search for noise ends


@dataclass(frozen=True)
class Figure:
    """A client's epsilon at one delta, all channels together and each alone (at the whole delta)."""

    epsilon: float
    delta: float
    channels: Mapping[str, float]


@dataclass(frozen=True)
class _Entry:
    """Equal releases of one channel."""

    kind: str
    noise: float
    rate: float
    steps: int


def need_accounting() -> Any:
    """The module ``dp_accounting``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import dp_accounting
        import dp_accounting.rdp
    except ImportError:
        raise UserError("Privacy accounting needs dp-accounting: pip install 'fedkern[privacy]'.") from None
    return dp_accounting


class Accountant:
    """The ledger of one client: what it released in each channel, and what that comes to.

    Args:
        state: what :attr:`state` was, for example out of ``client.state``; nothing is released yet where it is empty.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._entries: dict[str, list[_Entry]] = {}
        for channel, rows in (state or {}).items():
            self._entries[channel] = [_Entry(str(k), float(z), float(q), int(n)) for k, z, q, n in rows]

    @property
    def state(self) -> dict[str, Any]:
        """The ledger as plain lists; its size does not grow with equal releases."""
        return {name: [[e.kind, e.noise, e.rate, e.steps] for e in rows] for name, rows in self._entries.items()}

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels in which something was released, in the order of their first releases."""
        return tuple(self._entries)

    def gaussian(self, channel: str, noise: float, *, shards: int = 1, steps: int = 1) -> None:
        """Books ``steps`` releases of the Gaussian mechanism.

        Args:
            channel: the name it is reported by.
            noise: standard deviation of the noise over the sensitivity, the largest Euclidean change of the whole
                release when one record is replaced; 0 protects nothing.
            shards: of a client's data, of which one serves the release, drawn at random for each step and in secret:
                nothing that is released, then or later, may depend on the draw but this release.
            steps: how many such releases.

        Raises:
            ValueError: a number is out of range.
        """
        if not noise >= 0 or math.isinf(noise):
            raise ValueError(f"noise must be a finite number of at least 0, not {noise}")
        if shards < 1 or steps < 0:
            raise ValueError(f"shards must be at least 1 and steps at least 0, not {shards} and {steps}")
        self._book(channel, _Entry(GAUSSIAN, float(noise), 1 / shards, steps))

    def dp_sgd(self, channel: str, noise: float, *, rate: float, steps: int) -> None:
        """Books steps of DP-SGD: Poisson-sampled batches, per-sample gradients clipped, noise on their sum.

        Args:
            channel: the name it is reported by.
            noise: standard deviation of the noise over the clipping norm.
            rate: probability of a record to be in a batch.
            steps: how many.

        Raises:
            ValueError: a number is out of range.
        """
        if not noise >= 0 or not 0 < rate <= 1 or steps < 0:
            raise ValueError(f"noise and steps must be at least 0, and rate in (0, 1], not {noise}, {steps} and {rate}")
        self._book(channel, _Entry(DP_SGD, float(noise), float(rate), steps))

    def _book(self, channel: str, entry: _Entry) -> None:
        rows = self._entries.setdefault(channel, [])
        for i, old in enumerate(rows):
            if (old.kind, old.noise, old.rate) == (entry.kind, entry.noise, entry.rate):
                rows[i] = _Entry(old.kind, old.noise, old.rate, old.steps + entry.steps)
                return
        rows.append(entry)

    def epsilon(self, delta: float, channel: str | None = None) -> float:
        """The epsilon at ``delta`` of all channels together, or of one; infinite where a release had no noise.

        Where DP-SGD and other releases come together each gets half of ``delta`` (basic composition); releases of one
        kind are composed in Renyi differential privacy.

        Raises:
            ValueError: ``delta`` is not in (0, 1).
            UserError: dp-accounting is not installed.
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta must be in (0, 1), not {delta}")
        rows = [e for name, own in self._entries.items() if channel in (None, name) for e in own if e.steps]
        kinds = [tuple(e for e in rows if e.kind == kind) for kind in (GAUSSIAN, DP_SGD)]
        share = delta / max(1, sum(bool(kind) for kind in kinds))
        return _replaced(kinds[0], share) + _hop(kinds[1], share)

    def figure(self, delta: float) -> Figure:
        """All channels together and each alone."""
        return Figure(self.epsilon(delta), delta, {name: self.epsilon(delta, name) for name in self._entries})


def added_or_removed(noise: float, rate: float, steps: int, delta: float) -> float:
    """The epsilon of DP-SGD as libraries quote it, where one record is added or removed.

    Raises:
        UserError: dp-accounting is not installed.
    """
    return _poisson((_Entry(DP_SGD, noise, rate, steps),), delta)


def least_noise(account: Callable[[float], Accountant], epsilon: float, delta: float) -> float:
    """The smallest noise with which what ``account`` books stays within ``(epsilon, delta)``, to a thousandth.

    Args:
        account: books everything that a client will release, given the one number that is looked for; more noise must
            not cost more.
        epsilon, delta: the target; the figure for the number returned is never above it.

    Raises:
        ValueError: ``epsilon`` is not finite and above 0, or ``delta`` not in (0, 1).
        UserError: no noise reaches the target, or dp-accounting is not installed.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be finite and above 0, not {epsilon}")

    from scipy.optimize import brentq  # half a second to load

    @functools.cache
    def excess(logarithm: float) -> float:
        """Logarithm of epsilon over its target; a bracketed search needs it finite."""
        found = account(math.exp(logarithm)).epsilon(delta)
        return min(math.log(found / epsilon), 50.0) if found > 0 else -50.0

    low, high = 0.0, 0.0
    while excess(high) > 0:
        low, high = high, high + 1.5
        if high > 20:
            raise UserError(
                f"No noise makes epsilon {epsilon:g} at delta {delta:g}: what is released without noise costs more."
            )
    while excess(low) <= 0:
        low, high = low - 1.5, low
        if low < -20:
            return math.exp(high)
    result = brentq(excess, low, high, xtol=_EXACT / 4)
    while excess(result) > 0:  # the root is known from either side
        result += _EXACT / 4
    return math.exp(result)


# -- each kind by dp-accounting ----------------------------------------------------------------------------------------


def _replaced(entries: tuple[_Entry, ...], delta: float) -> float:
    """Gaussian releases, one record replaced."""
    return _rdp(entries, "REPLACE_ONE", delta)


def _poisson(entries: tuple[_Entry, ...], delta: float) -> float:
    """DP-SGD, one record added or removed."""
    return _rdp(entries, "ADD_OR_REMOVE_ONE", delta)


def _rdp(entries: tuple[_Entry, ...], relation: str, delta: float) -> float:
    if not entries:
        return 0.0
    if any(entry.noise == 0 for entry in entries):
        return math.inf
    return float(_composed(entries, relation).get_epsilon(delta))


@functools.lru_cache(maxsize=256)
def _composed(entries: tuple[_Entry, ...], relation: str) -> Any:
    """The library's accountant of these releases; composing takes tenths of a second, asking for an epsilon nothing."""
    dp = need_accounting()
    accountant = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation[relation])
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # of orders that it leaves out, which makes epsilon no smaller
    try:
        _compose(dp, accountant, entries)
    finally:
        log.setLevel(level)
    return accountant


def _compose(dp: Any, accountant: Any, entries: tuple[_Entry, ...]) -> None:
    for entry in entries:
        event = dp.GaussianDpEvent(entry.noise)
        if entry.kind == DP_SGD:
            event = dp.PoissonSampledDpEvent(entry.rate, event)
        elif entry.rate < 1:
            event = dp.SampledWithoutReplacementDpEvent(round(1 / entry.rate), 1, event)
        accountant.compose(event, entry.steps)


def _hop(entries: tuple[_Entry, ...], delta: float) -> float:
    """DP-SGD, one record replaced: the neighbour is reached by one removal and one addition."""
    if not entries:
        return 0.0

    def fits(logarithm: float) -> bool:
        inner = _poisson(entries, math.exp(logarithm))
        return math.isfinite(inner) and logarithm + inner + math.log1p(math.exp(-inner)) <= math.log(delta)

    # The largest inner delta with (1 + exp(inner epsilon)) inner delta <= delta, by bisection over its logarithm.
    low, high = math.log(delta) - 200.0, math.log(delta)
    if not fits(low):
        return math.inf
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 2 * _poisson(entries, math.exp(low))
