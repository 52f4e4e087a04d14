"""Record of every communication round (metrics.jsonl)."""

import time

from fedkern.engine.parts.part import Record, RunPart, Summary, register_part
from fedkern.messages.states import State
from fedkern.privacy.guarantee import About
from fedkern.process import device_use


@register_part("records")
class Records(RunPart):
    """Part that completes a record and writes its public entries."""

    def begin(self, resumed: bool) -> None:
        if not resumed:
            self._run.store.metrics.truncate(0)

    def before_round(self, record: Record) -> None:
        device_use.begin(self._run.context.device)
        if not record.entry.one_off:
            record.put({"round": record.number, "rounds": record.rounds, "name": record.entry.name})
            record.put({"seconds": 0.0, "evaluated": record.due})

    def round_end(self, record: Record) -> None:
        if record.entry.one_off:
            return
        clients = {k: {**self._run.context.name_entry(int(k)), **info} for k, info in record.clients.items()}
        record.put({"clients": clients}, About.CLIENTS)
        if self._run.log.dropped:
            record.put({"dropped": self._run.log.dropped})
            self._run.log.dropped = []
        record.put({"phases": {name: round(value, 6) for name, value in record.seconds.items()}})
        self._run.timing.add(record.seconds)
        if used := device_use.figures(self._run.context.device):
            record.put({"device": used})
        record.put({"round_seconds": time.perf_counter() - record.started, "seconds": self._run.timing.seconds()})
        record.public = self._run.notices.disclosure.filter_entries(record.entries)
        written = {name: value for name, value in record.public.items() if name not in ("rounds", "evaluated")}
        self._run.store.metrics.append(written)

    def finish(self, summary: Summary) -> None:
        summary.entries["phases"] = self._run.timing.phases
        if self._run.log.dropped:  # after the last record
            summary.entries["dropped"] = self._run.log.dropped

    def state(self) -> State:
        timing, metrics, dropped = self._run.timing, self._run.store.metrics, self._run.log.dropped
        return {
            "seconds": timing.seconds(), "phases": timing.phases, "bytes": metrics.size, "sha256": metrics.digest,
            "dropped": dropped,
        }  # fmt: skip

    def restore(self, state: State) -> None:
        self._run.timing.restore(state["seconds"], state["phases"])
        self._run.log.dropped = state["dropped"]
        self._run.store.metrics.truncate(state["bytes"], state["sha256"])
