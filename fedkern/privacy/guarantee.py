"""What a method says of the differential privacy it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedkern.privacy.unit import IMAGE, Unit

LEDGER = "privacy"
"""Where in a client's state the engine looks for what it has released (an ``Accountant``'s ``state``)."""

PUBLIC = "what the server receives, model.safetensors, the records and the pictures"
"""What may leave the clients, so what a figure is about: checkpoints/ holds all the rest of a run."""


@dataclass(frozen=True)
class Guarantee:
    """What is covered and what is not; the figures come from the clients' ledgers.

    Attributes:
        delta: the probability at which epsilon is told.
        covers, leaves: what the figure covers and what it does not, each a few words that continue a sentence.
        conditions: what the figure holds on, at least one clause that continues "while".
        unit: what the neighbours differ in.
    """

    delta: float
    covers: tuple[str, ...]
    leaves: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ("the run's seed stays secret",)
    unit: Unit = IMAGE

    def statement(self, epsilon: float) -> str:
        """One plain sentence: for whom, of which files and on what condition the figure holds, and what it covers."""
        finite = math.isfinite(epsilon)
        given = f"Epsilon {epsilon:.3g}" if finite else "No finite epsilon"
        holds = f", is of {PUBLIC} while {listed(self.conditions)}; it" if finite else ","
        covers = f"covers {listed(self.covers)}" if self.covers else "covers nothing"
        leaves = f", but not {listed(self.leaves)}" if self.leaves else ""
        return (
            f"{given} at delta {self.delta:g}, the largest of any client when one of its {self.unit} is "
            f"replaced{holds} {covers}{leaves}."
        )


def listed(parts: tuple[str, ...]) -> str:
    """Parts of a sentence, at least one, with commas and "and" between them."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
