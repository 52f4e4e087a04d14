"""What a method says of the differential privacy it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEDGER = "privacy"
"""Where in a client's state the engine looks for what it has released (an ``Accountant``'s ``state``)."""


@dataclass(frozen=True)
class Guarantee:
    """What is covered and what is not; the figures come from the clients' ledgers.

    Attributes:
        delta: the probability at which epsilon is told.
        covers, leaves: what the figure covers and what it does not, each a few words that continue a sentence.
    """

    delta: float
    covers: tuple[str, ...]
    leaves: tuple[str, ...] = ()

    def statement(self, epsilon: float) -> str:
        """One plain sentence: for whom and on what condition the figure holds, what it covers and what not.

        All noise of a run follows from its seed.
        """
        finite = math.isfinite(epsilon)
        given = f"Epsilon {epsilon:.3g}" if finite else "No finite epsilon"
        secret = " and the seed in config.toml stays secret" if finite else ""
        covers = f"covers {listed(self.covers)}" if self.covers else "covers nothing"
        leaves = f", but not {listed(self.leaves)}" if self.leaves else ""
        return (
            f"{given} at delta {self.delta:g}, the largest of any client when one of its records is replaced{secret}, "
            f"{covers}{leaves}."
        )


def listed(parts: tuple[str, ...]) -> str:
    """Parts of a sentence, at least one, with commas and "and" between them."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
