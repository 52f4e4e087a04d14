"""Privacy ledger of a client and its epsilon, by Google's dp-accounting (`fedkern.privacy.bounds`).

Neighbouring data sets differ in one *replaced* record, the unit of privacy, so the number of records is public.

Client-level (user-level) differential privacy is DP-FedAvg of McMahan et al. (ICLR 2018, arXiv 1710.06963). A round of
a trusted server is one release of the Gaussian mechanism:

    release = start + (sum over k of u_k min(1, C / |u_k|) + N(0, (Z C)^2 I)) / n

u_k is the whole update of client k, n the number of clients asked, whoever answers, C is ``clip`` and Z is ``noise``. A
client's data set is *replaced*, which changes the sum by at most 2 C, so a round's noise is Z / 2 sensitivities. The
paper adds or removes a client, so its epsilon is about half of this one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fedkern.errors import UserError
from fedkern.privacy.bounds import DP_SGD, GAUSSIAN, Entry, bound_replaced
from fedkern.privacy.guarantee import CLIENT, Guarantee, Unit

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
        entries = (entry for name, log in self._entries.items() if channel in (None, name) for entry in log)
        return bound_replaced(tuple(entries), delta)

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


CHANNEL = "updates"
ADAPTIVE, FIRST_CLIP, CLIP_RATE = "adaptive:", 0.1, 0.2
"""Prefix of an adaptive norm, its value in the first round, and its learning rate (arXiv 1905.03871, section 3)."""
LEAST_VARIANCE = 0.1
"""Least share of its old value that a running variance keeps in a round: noise could make it negative."""


@dataclass(frozen=True)
class ClientLevel:
    """Mechanism of client-level differential privacy, and its accounting.

    Attributes:
        clip: C, the largest Euclidean norm of a client's update, above 0.
        noise: Z, the standard deviation of the noise on the sum of the updates over C; 0: no noise.
        delta: the delta at which epsilon is reported, in (0, 1).
        quantile: share of the clients whose updates C should leave as they are; None: C stays as it is.
    """

    clip: float
    noise: float
    delta: float
    quantile: float | None = None

    @classmethod
    def parse(cls, clip: str, noise: float, delta: float) -> Self:
        """Return the mechanism for a value of ``--dp-clip``: a number, or ``adaptive:QUANTILE``.

        Raises:
            UserError: the value is neither, or out of range.
        """
        is_adaptive = clip.startswith(ADAPTIVE)
        try:
            value = float(clip.removeprefix(ADAPTIVE))
        except ValueError:
            value = math.nan
        if not 0 < value < (1 if is_adaptive else math.inf):
            raise UserError(
                f"--dp-clip must be a number above 0, or adaptive:Q with a share Q between 0 and 1, not {clip}."
            )
        return cls(FIRST_CLIP, noise, delta, value) if is_adaptive else cls(value, noise, delta)

    def split_noise(self, clients: int) -> tuple[float, float]:
        """Return the noise on the sum of the updates over C, and on the number of updates within C.

        With a replaced client the sum changes by 2 C and the number by 1, so the two releases together are one of
        noise Z. The number gets ``clients`` / 20, as in the paper, or Z if that is more.
        """
        if self.quantile is None or not self.noise:
            return self.noise, 0.0
        number_noise = max(clients / 20, self.noise)
        return (self.noise**-2 - (2 * number_noise) ** -2) ** -0.5, number_noise

    def adapt(self, share: float) -> Self:
        """Return the mechanism of the next round, after one in which this share of the updates was within C."""
        assert self.quantile is not None
        return replace(self, clip=self.clip * math.exp(CLIP_RATE * (self.quantile - share)))

    def factor(self, norm: float) -> float:
        """Return the factor in (0, 1] on an update of this norm."""
        return min(1.0, self.clip / norm) if norm else 1.0

    def deviation(self, clients: int) -> float:
        """Return the standard deviation of the noise on every entry of the mean over ``clients`` clients."""
        return self.split_noise(clients)[0] * self.clip / clients

    def epsilon(self, releases: int, *, drawn: int = 1, of: int = 1) -> float:
        """Return the epsilon of several rounds together, at :attr:`delta`.

        0 without rounds, infinite without noise.

        Args:
            releases: number of rounds. Without a draw, only the rounds in which the client was asked.
            drawn, of: ``drawn`` clients out of ``of`` were drawn in every round, secretly, uniformly, without
                replacement and independently of other rounds. The smaller of the epsilons with and without this draw is
                returned, as both bounds hold.

        Raises:
            UserError: dp-accounting is not installed.
        """
        if not releases:
            return 0.0
        bounds = []
        for shards, part in ((1, 1), (of, drawn)) if drawn < of and self.noise else ((1, 1),):
            accountant = Accountant()
            accountant.gaussian(CHANNEL, self.noise / 2, shards=shards, drawn=part, steps=releases)
            bounds.append(accountant.epsilon(self.delta))
        return min(bounds)


def keep_variances(new: Tensor, old: Tensor) -> None:
    """Raise running variances ``new``, in place, to at least a tenth of ``old``."""
    torch.maximum(new, old.to(new.dtype) * LEAST_VARIANCE, out=new)


@dataclass(frozen=True)
class ClientGuarantee(Guarantee):
    """Guarantee of a run with client-level differential privacy.

    ``planned``: epsilon of all planned ``rounds``.
    """

    unit: Unit = CLIENT
    planned: float = math.inf
    rounds: int = 0

    public: ClassVar[str] = "what the server sends and the run folder without checkpoints/"
    part: ClassVar[str] = "a part of what is released"

    @property
    def neighbour(self) -> str:
        """The replacement that the epsilon is about, as a part of a sentence."""
        return "when the whole data set of one client is replaced"

    def to_dict(self) -> dict[str, object]:
        """Return the names of the releases, the unit, and the planned epsilon, delta and rounds."""
        return {
            **super().to_dict(), "unit": self.unit.name, self.figure: self.planned, "delta": self.delta,
            "rounds": self.rounds,
        }  # fmt: skip
