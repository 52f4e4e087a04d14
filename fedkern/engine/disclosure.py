"""What a run tells while it runs and in its folder, checkpoints/ apart (``--records``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedkern.privacy import Guarantee


@dataclass(frozen=True)
class Disclosure:
    """What metrics.jsonl, summary.json, pictures and displays may tell.

    Whatever is made of test sets and of the network that the run is for is always told: the network is released.

    Attributes:
        clients: what is about a single client, or made of what single clients did not send.
        server: what the server makes of the clients' messages: its figures, pictures and warnings.
        appraised: the figures of ``Method.oracle_metrics`` by name; None: all.
    """

    clients: bool = True
    server: bool = True
    appraised: Collection[str] | None = None

    @classmethod
    def of(cls, records: str | None, said: Guarantee | None) -> Disclosure:
        """What ``--records`` lets be told, where ``said`` is what the clients' releases are covered by."""
        if records != "private":
            return cls()
        covered = said is not None and said.complete
        return cls(clients=False, server=covered, appraised=said.appraised if said is not None and covered else ())

    def oracle_metrics(self, figures: Mapping[str, float], prefixes: Iterable[str]) -> dict[str, float]:
        """Those of a method's appraisal that may be told, whichever test set they are of."""
        if self.appraised is None:
            return dict(figures)
        told = {prefix + name for prefix in prefixes for name in self.appraised}
        return {name: value for name, value in figures.items() if name in told}

    def client(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """What a client has reported, or nothing."""
        return dict(info) if self.clients else {}
