"""Checkpoints: when they are made, and what stands in them beside states."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedkern.engine.ledger import Ledger
from fedkern.engine.participation import Participation
from fedkern.engine.parts.base import Part, Record, Summary
from fedkern.engine.progress import Progress
from fedkern.engine.registry import register_part
from fedkern.engine.run_objects import RunObjects
from fedkern.engine.server import Server
from fedkern.engine.store import records
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.records import Metrics
from fedkern.engine.store.releases import Releases
from fedkern.engine.store.saved_model import results
from fedkern.engine.timing import Timing
from fedkern.errors import NoEffect, UserError
from fedkern.files.atomic import Unwritable


@register_part("checkpoints")
class Checkpointing(Part):
    """Commits after every one-off round, every few communication rounds, and the last one.

    Args:
        checkpoints, out: of the run.
        facts: what a resumed run is compared with.
        states: gives the states of all parts and filters.
        every: communication rounds between two checkpoints.
        server, participation: their states are kept.
        progress, timing, ledger, metrics: of the run.
        releases: digests of what is released; None without a guarantee.
        alone: raises where another process has taken over the folder.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        out: Path,
        *,
        facts: Mapping[str, Any],
        states: Callable[[], dict[str, Any]],
        every: int,
        server: Server,
        progress: Progress,
        participation: Participation,
        timing: Timing,
        ledger: Ledger,
        metrics: Metrics,
        releases: Releases | None,
        alone: Callable[[], object],
    ) -> None:
        self._checkpoints, self._out, self._facts, self._states, self._every = checkpoints, out, facts, states, every
        self._server, self._progress, self._participation, self._timing = server, progress, participation, timing
        self._ledger, self._metrics, self._releases, self._alone = ledger, metrics, releases, alone

    @classmethod
    def build(cls, run: RunObjects) -> Checkpointing:
        return cls(
            run.checkpoints, run.out, facts=run.facts, states=run.kept, every=run.config.checkpoint_every,
            server=run.server, progress=run.progress, participation=run.participation, timing=run.timing,
            ledger=run.ledger, metrics=run.metrics, releases=run.releases, alone=run.alone,
        )  # fmt: skip

    def before_round(self, record: Record) -> None:
        self._alone()

    def round_end(self, record: Record) -> None:
        due = record.entry.one_off or self._progress.done % self._every == 0
        if not (due or record.last or record.stop is not None):
            return
        begun = time.perf_counter()
        self._alone()
        info = self._info(finished=False)
        try:
            self._checkpoints.commit(
                round=self._progress.done, plan=self._progress.planned, server=self._server.state,
                participation=self._participation.state(), messages=self._participation.in_flight(), info=info,
                before=self._metrics.sync, booked=self._ledger.changed_rows(),
            )  # fmt: skip
        except UserError as error:
            if self._checkpoints.entries or isinstance(error, Unwritable):  # a run goes on where its disk had been full
                raise
            raise NoEffect(str(error)) from None
        if self._releases is not None:
            self._releases.forget(self._checkpoints.entries[0]["plan"])
        self._timing.add({"checkpoint": time.perf_counter() - begun})

    def finish(self, summary: Summary) -> None:
        self._checkpoints.amend({**self._info(finished=True), "results": results(self._out)})

    def _info(self, finished: bool) -> dict[str, Any]:
        return dict(records.plain({**self._facts, **self._states(), "finished": finished}))
