"""Privacy ledger of a client and its epsilon, by Google's dp-accounting (`fedkern.privacy.bounds`).

Neighbouring data sets differ in one *replaced* record, the unit of privacy, so the number of records is public.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedkern.errors import UserError
from fedkern.privacy.bounds import DP_SGD, GAUSSIAN, Entry, bound_replaced

_MOST_STEPS = 1 << 53
_EXACT = 1e-3  # relative width at which the search for noise ends


@dataclass(frozen=True)
class Figure:
    """Epsilon of a client at one delta: of all channels together, and of each channel alone at the whole delta."""

    epsilon: float
    delta: float
    channels: Mapping[str, float]


class Accountant:
    """Privacy ledger of a client: releases by channel, and their epsilon.

    Args:
        state: an earlier value of :attr:`state`, for example from ``client.state``. None or empty: no releases yet.

    Raises:
        ValueError: ``state`` holds an entry that no release books.

    Example:
        >>> accountant = Accountant()
        >>> accountant.gaussian("class_counts", noise=5.0)
        >>> round(accountant.epsilon(1e-5), 2)
        0.73
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._entries: dict[str, list[Entry]] = {}
        for channel, rows in (state or {}).items():
            self._entries[channel] = [Entry(str(k), float(z), float(q), int(n)) for k, z, q, n in rows]
        for e in (e for rows in self._entries.values() for e in rows):
            if e.kind not in (GAUSSIAN, DP_SGD) or not (
                e.noise >= 0 and 0 < e.rate <= 1 and 0 <= e.steps < _MOST_STEPS
            ):
                raise ValueError(f"state: no release books the entry {e}")

    @property
    def state(self) -> dict[str, list[list[str | float]]]:
        """The ledger as plain lists, one entry per kind of equal releases."""
        return {name: [[e.kind, e.noise, e.rate, e.steps] for e in rows] for name, rows in self._entries.items()}

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels with releases, in the order of their first releases."""
        return tuple(self._entries)

    def gaussian(self, channel: str, noise: float, *, shards: int = 1, drawn: int = 1, steps: int = 1) -> None:
        """Book ``steps`` releases of the Gaussian mechanism.

        Args:
            channel: the name under which the releases are reported.
            noise: standard deviation of the noise over the sensitivity. The sensitivity is the largest Euclidean change
                of the whole release when one record is replaced. 0 protects nothing.
            shards: number of shards of the data, of which a release uses ``drawn``. They must be drawn at random,
                without replacement and in secret for each step. No other release, then or later, may depend on the
                draw.
            drawn: how many shards are drawn, at most ``shards``.
            steps: number of such releases.

        Raises:
            ValueError: a number is out of range.
        """
        if not noise >= 0 or math.isinf(noise):
            raise ValueError(f"noise must be a finite number of at least 0, not {noise}")
        if not 1 <= drawn <= shards or steps < 0:
            text = f"{shards}, {drawn} and {steps}"
            raise ValueError(f"shards and drawn must be at least 1, drawn <= shards, and steps at least 0, not {text}")
        self._book(channel, Entry(GAUSSIAN, float(noise), drawn / shards, steps))

    def dp_sgd(self, channel: str, noise: float, *, rate: float, steps: int) -> None:
        """Book steps of DP-SGD: Poisson-sampled batches, per-sample gradients clipped, noise on their sum.

        Args:
            channel: the name under which the steps are reported.
            noise: standard deviation of the noise over the clipping norm.
            rate: probability that a record is in a batch.
            steps: number of steps.

        Raises:
            ValueError: a number is out of range.
        """
        if not noise >= 0 or not 0 < rate <= 1 or steps < 0:
            raise ValueError(f"noise and steps must be at least 0, and rate in (0, 1], not {noise}, {steps} and {rate}")
        self._book(channel, Entry(DP_SGD, float(noise), float(rate), steps))

    def _book(self, channel: str, entry: Entry) -> None:
        rows = self._entries.setdefault(channel, [])
        for i, old in enumerate(rows):
            if (old.kind, old.noise, old.rate) == (entry.kind, entry.noise, entry.rate):
                rows[i] = Entry(old.kind, old.noise, old.rate, old.steps + entry.steps)
                return
        rows.append(entry)

    def epsilon(self, delta: float, channel: str | None = None) -> float:
        """Return the epsilon at ``delta`` of all channels together, or of one.

        Infinite if a release had no noise.

        Raises:
            ValueError: ``delta`` is not in (0, 1).
            UserError: dp-accounting is not installed.
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta must be in (0, 1), not {delta}")
        return bound_replaced(
            tuple(e for name, log in self._entries.items() if channel in (None, name) for e in log), delta
        )

    def figure(self, delta: float) -> Figure:
        """Return the epsilon of all channels together and of each channel alone."""
        return Figure(self.epsilon(delta), delta, {name: self.epsilon(delta, name) for name in self._entries})


def least_noise(account: Callable[[float], Accountant], epsilon: float, delta: float) -> float:
    """Return the smallest noise, to a thousandth, with which a client's releases stay within ``(epsilon, delta)``.

    Args:
        account: books everything that the client will release, given the noise; more noise must not give a larger
            epsilon.
        epsilon, delta: the target; the epsilon of the returned noise is never above it.

    Raises:
        ValueError: ``epsilon`` is not finite and above 0, or ``delta`` not in (0, 1).
        UserError: no noise reaches the target, or dp-accounting is not installed.

    Example:
        >>> def account(noise):
        ...     accountant = Accountant()
        ...     accountant.dp_sgd("training", noise, rate=0.01, steps=1000)
        ...     return accountant
        >>> round(least_noise(account, epsilon=8.0, delta=1e-5), 2)
        0.62
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be finite and above 0, not {epsilon}")

    from scipy.optimize import brentq  # half a second to load

    @functools.cache
    def excess(logarithm: float) -> float:
        value = account(math.exp(logarithm)).epsilon(delta)
        return min(math.log(value / epsilon), 50.0) if value > 0 else -50.0

    low, high = 0.0, 0.0
    while excess(high) > 0:
        low, high = high, high + 1.5
        if high > 20:
            raise UserError(
                f"No noise makes epsilon {epsilon:g} at delta {delta:g}, as other releases cost more: give these more "
                "noise (histogram_noise), leave them out (class_weights=uniform), or take a larger epsilon."
            )
    while excess(low) <= 0:
        low, high = low - 1.5, low
        if low < -20:
            return math.exp(high)
    result = brentq(excess, low, high, xtol=_EXACT / 4)
    while excess(result) > 0:  # brentq may end on either side of the root
        result += _EXACT / 4
    return math.exp(result)
