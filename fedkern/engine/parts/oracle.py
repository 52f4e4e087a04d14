"""Figures that only an experimenter with a view of all clients has (``Method.oracle_metrics``)."""

from fedkern.engine.clients import AllClients
from fedkern.engine.context import convert_figures
from fedkern.engine.parts.part import Part, RunPart, Summary, register_part
from fedkern.engine.setup.run_objects import RunObjects


@register_part("oracle")
class Oracle(RunPart):
    """Part that adds these figures to the summary."""

    @classmethod
    def build(cls, run: RunObjects) -> Part | None:
        return None if run.request.remote is not None else cls(run)

    def finish(self, summary: Summary) -> None:
        run, disclosure = self._run, self._run.notices.disclosure
        if disclosure.derived_figures is not None and not disclosure.derived_figures:
            return
        clients = AllClients(run.context, run.store.checkpoints)
        with run.code("oracle_metrics"):
            metrics = run.method.oracle_metrics(run.server, clients, run.sets)
        figures = convert_figures(metrics, "oracle_metrics")
        summary.metrics.update(disclosure.oracle_metrics(figures, ("", *run.sets)))
