"""Figures that the method's server reports of a round (``server.report``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedkern.engine.node import figures
from fedkern.engine.parts.base import Part, Record, Summary
from fedkern.engine.registry import register_part
from fedkern.engine.run_objects import RunObjects
from fedkern.engine.server import Server
from fedkern.privacy.disclosure import About, Disclosure
from fedkern.tasks.figure_names import FIGURE_NAMES, RECORD_NAMES


@register_part("server")
class ServerFigures(Part):
    """Puts the server's figures into records and summary, where they may be told.

    Args:
        server: the server.
        disclosure: what may be told.
    """

    def __init__(self, server: Server, disclosure: Disclosure) -> None:
        self._server, self._disclosure = server, disclosure

    @classmethod
    def build(cls, run: RunObjects) -> ServerFigures:
        return cls(run.server, run.context.disclosure)

    def round_end(self, record: Record) -> None:
        if record.entry.one_off:
            return
        names = {*self._disclosure.told(record.entries), *RECORD_NAMES, *(FIGURE_NAMES & self._server.report.keys())}
        for name, value in figures(self._server.report, "server.report", names).items():
            self._server.report[name] = float(value)
        record.put(self._server.report, About.SERVER)

    def finish(self, summary: Summary) -> None:
        entries = {name: (About.SERVER, value) for name, value in self._server.report.items()}
        summary.metrics.update(self._disclosure.told(entries))

    def state(self) -> dict[str, Any]:
        return dict(self._server.report)

    def restore(self, state: Mapping[str, Any]) -> None:
        # JSON has no NaN or infinity: such a value is None in a checkpoint.
        self._server.report = {name: math.nan if value is None else value for name, value in state.items()}
