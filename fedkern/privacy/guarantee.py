"""Differential-privacy guarantee of a method: the covered releases, and the sentences that a run prints.

Neighbouring data sets differ in a unit of privacy: an image, a patient with all images, or a client.  ``--records``
rules what a run may disclose outside checkpoints/.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar, TypeVar

from fedkern.errors import join_words

UNITS = ("image", "patient")
"""The units that ``--privacy-unit`` names."""


@dataclass(frozen=True)
class Unit:
    """Unit of privacy: neighbouring data sets differ in one replaced unit.

    A client's number of units is public.

    Attributes:
        name: one of `UNITS`, or ``"client"``.
        images: the largest number of images of a unit. A patient may have fewer, and that number is not public.
    """

    name: str = "image"
    images: int = 1

    def __str__(self) -> str:
        """Return the units in words that continue "one of its"."""
        if self.name == "image":
            return "images"
        return f"patients (each with at most {self.images} image{'s' * (self.images != 1)})"

    @property
    def change(self) -> str:
        """The difference between neighbouring data sets, as a clause."""
        by_client = self.name == "client"
        return "the whole data set of one is replaced" if by_client else f"one of a client's {self} is replaced"


IMAGE = Unit()
CLIENT = Unit("client")


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


T = TypeVar("T")


class About(Enum):
    """Subject of an entry in a record or a summary."""

    RUN = "the run and its network"
    SERVER = "what the server computes from the clients' messages"
    CLIENTS = "single clients"


@dataclass(frozen=True)
class Disclosure:
    """Rules for metrics.jsonl, summary.json, pictures and displays.

    Figures of the run's network on test sets are always disclosed, because the network is released.

    Attributes:
        clients: whether to disclose facts of single clients, or from data that clients did not send.
        server: whether to disclose what the server computes from the clients' messages.
        derived_figures: names of the figures of ``Method.oracle_metrics`` to disclose; None: all.
    """

    clients: bool = True
    server: bool = True
    derived_figures: Collection[str] | None = None

    @classmethod
    def of(cls, records: str | None, guarantee: Guarantee | None) -> Disclosure:
        """Return the rules for a value of ``--records`` and the run's guarantee."""
        if records != "private":
            return cls()
        if guarantee is None or not guarantee.complete:
            return cls(clients=False, server=False, derived_figures=())
        return cls(clients=False, derived_figures=guarantee.derived_figures)

    def oracle_metrics(self, figures: Mapping[str, float], prefixes: Iterable[str]) -> dict[str, float]:
        if self.derived_figures is None:
            return dict(figures)
        names = {prefix + name for prefix in prefixes for name in self.derived_figures}
        return {name: value for name, value in figures.items() if name in names}

    def filter_entries(self, entries: Mapping[str, tuple[About, T]]) -> dict[str, T]:
        withheld = {About.RUN: False, About.SERVER: not self.server, About.CLIENTS: not self.clients}
        return {name: value for name, (about, value) in entries.items() if not withheld[about]}

    def client(self, info: Mapping[str, T]) -> dict[str, T]:
        return dict(info) if self.clients else {}
