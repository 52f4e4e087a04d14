"""Differential-privacy guarantee of a method: the covered releases, and the sentences that a run prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedkern.errors import join_words
from fedkern.privacy.unit import IMAGE, Unit

LEDGER = "privacy"
"""Key in a client's state of the ledger of its releases (an ``Accountant``'s ``state``), which the engine reads."""

PUBLIC = "what the server receives and the run folder without checkpoints/"
"""Everything that an epsilon is about; checkpoints/ holds the rest of a run."""

EPSILON, PART = "epsilon", "epsilon_covered"
"""Names of the figure if it covers everything that the clients release, and if it covers a part."""

RECORDS = "records"
"""Name of the release that the engine adds with ``--records all``."""


@dataclass(frozen=True)
class Guarantee:
    """Releases of a client that are covered by noise, and releases that are not.

    The figures come from the clients' ledgers.

    Attributes:
        delta: the delta at which epsilon is reported.
        covers: the releases that the figure covers, from name to a few words that continue a sentence.
        leaves: the releases that the figure does not cover, in the same form. Every release is in ``covers`` or in
            ``leaves``; the figure is called ``epsilon`` only if ``leaves`` is empty.
        conditions: what the figure depends on, at least one clause that continues "while".
        unit: the unit of privacy, in which neighbouring data sets differ.
        follows: what the server computes from the releases, which is covered if all releases are.
        advice: a clause on how to cover more.
        derived_figures: figures of ``Method.oracle_metrics`` that follow from the releases alone.
    """

    delta: float
    covers: Mapping[str, str]
    leaves: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[str, ...] = ("the run's seed stays secret",)
    unit: Unit = IMAGE
    follows: str = ""
    advice: str = ""
    derived_figures: tuple[str, ...] = ()

    public: ClassVar[str] = PUBLIC
    """Files that a complete figure is about."""
    part: ClassVar[str] = "a part of what the clients release"
    """Releases that a partial figure is about."""

    @property
    def complete(self) -> bool:
        """True if every release of a client is covered."""
        return not self.leaves

    @property
    def figure(self) -> str:
        """The figure's name, so that a partial figure is never taken for the whole."""
        return EPSILON if self.complete else PART

    @property
    def neighbour(self) -> str:
        """The replacement that the epsilon is about, as a part of a sentence."""
        return f"the largest of any client when one of its {self.unit} is replaced"

    def with_records(self) -> Guarantee:
        """Return the guarantee of a run that records figures of single clients, which no noise covers."""
        return replace(self, leaves={**self.leaves, RECORDS: "what the records tell of single clients"})

    def to_dict(self) -> dict[str, object]:
        """Return the names of the releases, as ``covers`` and ``leaves_uncovered``."""
        return {"covers": list(self.covers), "leaves_uncovered": list(self.leaves)}

    def statement(self, epsilon: float) -> str:
        """Return a sentence on ``epsilon``: its neighbours, files and conditions, and what it covers."""
        finite = math.isfinite(epsilon)
        figure = f"Epsilon {epsilon:.3g}" if finite else "No finite epsilon"
        of = f"{self.public if self.complete else self.part} "
        holds = f", is of {of}while {join_words(self.conditions)}; it" if finite else ","
        consequence = (f"so {self.follows}",) if self.complete and self.follows else ()
        covered = (*self.covers.values(), *consequence)
        covers = f"covers {join_words(covered)}" if covered else "covers nothing"
        leaves = f", but not {join_words(list(self.leaves.values()))}" if self.leaves else ""
        remark = "" if self.complete else ": the whole release has no epsilon"
        return f"{figure} at delta {self.delta:g}, {self.neighbour}{holds} {covers}{leaves}{remark}."

    def warning(self) -> str:
        """Return the warning before a run whose guarantee is not :attr:`complete`."""
        covered = join_words(tuple(self.covers.values())) if self.covers else "nothing"
        advice = f"; {self.advice}" if self.advice else ""
        return (
            f"The whole release has no epsilon: what is told as {PART} covers {covered}, not "
            f"{join_words(list(self.leaves.values()))}{advice}."
        )
