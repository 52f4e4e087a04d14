"""Warnings about the final network and clients' reports (`fedkern.engine.figures.diagnostics`)."""

from typing import Any

from fedkern.engine.figures import diagnostics
from fedkern.engine.parts.part import Record, RunPart, Summary, register_part
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.store.run_folder import lacks_statistics
from fedkern.messages.states import State


@register_part("diagnoses")
class Diagnoses(RunPart):
    """Part that looks for signs of failed training."""

    def __init__(self, run: RunObjects) -> None:
        super().__init__(run)
        self._observed = diagnostics.Observations()
        self._last: dict[str, Any] = {}  # what clients reported in the last communication round
        self._final: list[str] = []  # names of the warnings about the final network

    def round_end(self, record: Record) -> None:
        for report in record.reports:
            self._observed.add(report)
        if not record.entry.one_off:
            self._last = record.clients

    def finish(self, summary: Summary) -> None:
        run, context, sets, config = self._run, self._run.context, self._run.sets, self._run.config
        # Whether figures of single clients may be disclosed.
        public = context.notices.disclosure.clients
        classes, names, metrics = context.data.classes, [prefix[:-1] for prefix in sets], summary.metrics
        added = {name for data in sets.values() for name in getattr(data.task, "metrics", ())}
        added |= {metric.name for data in sets.values() for metric in getattr(data, "metrics", ())}
        flat = context.networks.is_flat(summary.network)
        constant = diagnostics.constants(sets, classes) if public else {}
        missing_statistics = {
            "no-running-statistics": f"With --buffers {config.buffers} the global model has no batch norm statistics: "
            "it was evaluated with those of each test batch, and so is what model.safetensors holds."
        }
        with run.code("diagnose"):
            observed = run.method.diagnose(self._observed.summary()) if public else {}
        for texts in (
            diagnostics.collapsed_classes(sets, classes, metrics, config),
            diagnostics.unvaried_labels(sets),
            diagnostics.outlying_drift(self._last, context.data.client_label) if public else {},
            diagnostics.poor_metrics(metrics, summary.best, len(classes), constant, config, names, added),
            missing_statistics if flat and lacks_statistics(context, config) else {},
            diagnostics.missing_metrics(config.method, config.data, sets, summary.latest),
            diagnostics.undefined_figures(sets, summary.of_clients, context.data.client_label),
            observed,
        ):
            for name, text in texts.items():
                if name not in context.notices.warnings:
                    self._final.append(name)
                context.notices.warn(name, text)

    def state(self) -> State:
        return {"observed": self._observed.to_dict(), "clients": self._last, "final": self._final}

    def restore(self, state: State) -> None:
        self._observed = diagnostics.Observations(state["observed"])
        self._last, self._final = state["clients"], list(state["final"])
