"""Differential privacy of a run: conditions of its releases, and figures in records and summary."""

from collections.abc import Mapping
from typing import Any

from fedkern.engine.figures.privacy_report import privacy_figures
from fedkern.engine.parts.part import Record, RunPart, Summary, register_part
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.messages.states import State
from fedkern.privacy import server_secret
from fedkern.privacy.guarantee import EPSILON, PART


@register_part("privacy")
class Privacy(RunPart):
    """Part that keeps the promises of a run with a guarantee or with private clients."""

    def __init__(self, run: RunObjects) -> None:
        super().__init__(run)
        self._before: Mapping[str, Any] = {}  # rounds and epsilon planned at the run's start

    def begin(self, resumed: bool) -> None:
        run, store, private = self._run, self._run.store, self._run.private
        if private is not None and self._before.get("rounds", run.rounds) != run.rounds:
            run.notices.warn(
                "larger-epsilon",
                f"The run was planned for {self._before['rounds']} rounds with epsilon {self._before['epsilon']:.3g}: "
                f"its {run.rounds} rounds have epsilon {private.planned:.3g}.",
            )
        if store.releases is None:
            return
        store.releases.open(run.progress.planned)
        if private is not None and run.config.dp_draws == "secret":
            private.keep(server_secret.load_or_create(store.checkpoints.folder, begun=resumed))
        store.checkpoints.write_at_once()  # a release may leave a client only after its privacy cost is on disk

    def round_end(self, record: Record) -> None:
        if self._run.private is not None and not record.entry.one_off:
            record.put(self._run.private.figures_after(self._run.progress.done))

    def finish(self, summary: Summary) -> None:
        run = self._run
        if run.private is not None:
            report = run.private.report(run.progress.done)
        else:
            report = privacy_figures(run.guarantee, run.store.checkpoints.client_state, run.config.trained_clients)
        summary.metrics.update({name: report[name] for name in (EPSILON, PART, "delta") if name in report})
        if report:
            summary.entries["privacy"] = report

    def state(self) -> State:
        if self._run.private is None or self._run.guarantee is None:
            return {}
        return {"rounds": self._run.rounds, "epsilon": self._run.private.planned}

    def restore(self, state: State) -> None:
        self._before = state
