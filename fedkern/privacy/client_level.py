"""Client-level (user-level) differential privacy: DP-FedAvg of McMahan et al. (ICLR 2018, arXiv 1710.06963).

A round of a trusted server is one release of the Gaussian mechanism:

    release = start + (sum over k of u_k min(1, C / |u_k|) + N(0, (Z C)^2 I)) / n

u_k is the whole update of client k, n the number of clients asked, whoever answers, C is ``clip`` and Z is ``noise``. A
client's data set is *replaced*, which changes the sum by at most 2 C, so a round's noise is Z / 2 sensitivities. The
paper adds or removes a client, so its epsilon is about half of this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedkern.privacy.accounting import Accountant
from fedkern.privacy.guarantee import Guarantee
from fedkern.privacy.unit import CLIENT, Unit

CHANNEL = "updates"
LEAST_VARIANCE = 0.1
"""Least share of its old value that a running variance keeps in a round: noise could make it negative."""


@dataclass(frozen=True)
class ClientLevel:
    """Mechanism of client-level differential privacy, and its accounting.

    Attributes:
        clip: C, the largest Euclidean norm of a client's update, above 0.
        noise: Z, the standard deviation of the noise on the sum of the updates over C; 0: no noise.
        delta: the delta at which epsilon is reported, in (0, 1).
    """

    clip: float
    noise: float
    delta: float

    def factor(self, norm: float) -> float:
        """Return the factor in (0, 1] on an update of this norm."""
        return min(1.0, self.clip / norm) if norm else 1.0

    def deviation(self, clients: int) -> float:
        """Return the standard deviation of the noise on every entry of the mean over ``clients`` clients."""
        return self.noise * self.clip / clients

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
        unsampled = Accountant()
        unsampled.gaussian(CHANNEL, self.noise / 2, steps=releases)
        bound = unsampled.epsilon(self.delta)
        if drawn < of and self.noise:
            sampled = Accountant()
            sampled.gaussian(CHANNEL, self.noise / 2, shards=of, drawn=drawn, steps=releases)
            bound = min(bound, sampled.epsilon(self.delta))
        return bound


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
