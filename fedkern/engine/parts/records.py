"""metrics.jsonl: a record of every communication round."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fedkern.engine.context import RunContext
from fedkern.engine.parts.base import Part, Record, Summary
from fedkern.engine.registry import register_part
from fedkern.engine.round_log import RoundLog
from fedkern.engine.run_objects import RunObjects
from fedkern.engine.store.records import Metrics
from fedkern.engine.timing import Timing
from fedkern.privacy.disclosure import About
from fedkern.process import device_use


@register_part("records")
class Records(Part):
    """Completes a record and writes what of it may be told.

    Args:
        metrics: the file.
        context: gives names of clients, the device, and what may be told.
        log: knows which clients were left out.
        timing: of the run.
    """

    def __init__(self, metrics: Metrics, context: RunContext, log: RoundLog, timing: Timing) -> None:
        self._metrics, self._context, self._log, self._timing = metrics, context, log, timing

    @classmethod
    def build(cls, run: RunObjects) -> Records:
        return cls(run.metrics, run.context, run.log, run.timing)

    def begin(self, resumed: bool) -> None:
        if not resumed:
            self._metrics.truncate(0)

    def before_round(self, record: Record) -> None:
        device_use.begin(self._context.device)
        if not record.entry.one_off:
            record.put(
                {
                    "round": record.number,
                    "rounds": record.rounds,
                    "name": record.entry.name,
                    "seconds": 0.0,
                    "evaluated": record.due,
                }
            )

    def round_end(self, record: Record) -> None:
        if record.entry.one_off:
            return
        clients = {k: {**self._context.named(int(k)), **info} for k, info in record.clients.items()}
        record.put({"clients": clients}, About.CLIENTS)
        if self._log.dropped:
            record.put({"dropped": self._log.dropped})
            self._log.dropped = []
        record.put({"phases": {name: round(value, 6) for name, value in record.seconds.items()}})
        self._timing.add(record.seconds)
        if used := device_use.figures(self._context.device):
            record.put({"device": used})
        record.put({"round_seconds": time.perf_counter() - record.started, "seconds": self._timing.seconds()})
        record.public = self._context.disclosure.told(record.entries)
        self._metrics.append(
            {name: value for name, value in record.public.items() if name not in ("rounds", "evaluated")}
        )

    def finish(self, summary: Summary) -> None:
        summary.entries["phases"] = self._timing.phases
        if self._log.dropped:  # after the last record
            summary.entries["dropped"] = self._log.dropped

    def state(self) -> dict[str, Any]:
        return {
            "seconds": self._timing.seconds(), "phases": self._timing.phases, "bytes": self._metrics.size,
            "sha256": self._metrics.digest, "dropped": self._log.dropped,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        self._timing.restore(state["seconds"], state["phases"])
        self._log.dropped = state["dropped"]
        self._metrics.truncate(state["bytes"], state["sha256"])
