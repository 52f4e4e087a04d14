"""What a method says of the differential privacy it gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedkern.privacy.unit import IMAGE, Unit

LEDGER = "privacy"
"""Where in a client's state the engine looks for what it has released (an ``Accountant``'s ``state``)."""

PUBLIC = "what the server receives, model.safetensors, the records and the pictures"
"""What may leave the clients, so what a figure is about: checkpoints/ holds all the rest of a run."""

EPSILON, PART = "epsilon", "epsilon_covered"
"""What the figure is called: where it covers everything that the clients release, and where it covers a part."""

RECORDS = "records"
"""The release that the engine adds with ``--records all``."""


@dataclass(frozen=True)
class Guarantee:
    """What is covered and what not, of everything that a client releases; the figures come from the clients' ledgers.

    Attributes:
        delta: the probability at which epsilon is told.
        covers, leaves: the releases that the figure covers and those that it does not cover, by name; the text is a few
            words that continue a sentence.  Every release stands in one of them: only without ``leaves`` is there an
            epsilon.
        conditions: what the figure holds on, at least one clause that continues "while".
        unit: what the neighbours differ in.
        follows: what the server makes of the releases, which is covered where all of them are.
        advice: how more would be covered, a clause.
        appraised: figures of ``Method.appraise`` that follow from the releases alone.
    """

    delta: float
    covers: Mapping[str, str]
    leaves: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[str, ...] = ("the run's seed stays secret",)
    unit: Unit = IMAGE
    follows: str = ""
    advice: str = ""
    appraised: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything that a client releases is covered."""
        return not self.leaves

    @property
    def figure(self) -> str:
        """The name that the figure goes by, so that a part never passes for the whole."""
        return EPSILON if self.complete else PART

    def with_records(self) -> Guarantee:
        """The same of a run whose records tell of single clients, which no noise covers."""
        return replace(self, leaves={**self.leaves, RECORDS: "what the records tell of single clients"})

    def to_dict(self) -> dict[str, Any]:
        """``covers`` and ``leaves_uncovered``, names of releases."""
        return {"covers": list(self.covers), "leaves_uncovered": list(self.leaves)}

    def statement(self, epsilon: float) -> str:
        """One plain sentence: for whom, of which files and on what condition the figure holds, and what it covers."""
        finite = math.isfinite(epsilon)
        given = f"Epsilon {epsilon:.3g}" if finite else "No finite epsilon"
        of = f"{PUBLIC} " if self.complete else "a part of what the clients release "
        holds = f", is of {of}while {listed(self.conditions)}; it" if finite else ","
        made = (f"so {self.follows}",) if self.complete and self.follows else ()
        covered = (*self.covers.values(), *made)
        covers = f"covers {listed(covered)}" if covered else "covers nothing"
        leaves = f", but not {listed(tuple(self.leaves.values()))}" if self.leaves else ""
        whole = "" if self.complete else ": the whole release has no epsilon"
        return (
            f"{given} at delta {self.delta:g}, the largest of any client when one of its {self.unit} is "
            f"replaced{holds} {covers}{leaves}{whole}."
        )

    def warning(self) -> str:
        """What to say of a guarantee that is not :attr:`complete`, before the run."""
        covered = listed(tuple(self.covers.values())) if self.covers else "nothing"
        advice = f"; {self.advice}" if self.advice else ""
        return (
            f"The whole release has no epsilon: what is told as {PART} covers {covered}, not "
            f"{listed(tuple(self.leaves.values()))}{advice}."
        )


def listed(parts: tuple[str, ...]) -> str:
    """Parts of a sentence, at least one, with commas and "and" between them."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
