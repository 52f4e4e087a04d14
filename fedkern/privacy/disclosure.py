"""Rules on what a run may disclose outside checkpoints/ (``--records``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from fedkern.privacy.guarantee import Guarantee

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
        covered = guarantee is not None and guarantee.complete
        return cls(
            clients=False,
            server=covered,
            derived_figures=guarantee.derived_figures if guarantee is not None and covered else (),
        )

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
