"""What a run writes at its end: evaluation.csv, the model, summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedkern.engine.context import RunContext
from fedkern.engine.parts.base import Part, Summary
from fedkern.engine.progress import Progress
from fedkern.engine.reader import Reader
from fedkern.engine.registry import register_part
from fedkern.engine.run_objects import RunObjects
from fedkern.engine.store import records
from fedkern.engine.store.evaluation_file import rows, write_evaluation
from fedkern.engine.store.saved_model import MODEL, about_network, write_model
from fedkern.engine.timing import Timing
from fedkern.process import versions


@register_part("results")
class Results(Part):
    """Writes the results, and puts them into the summary as they stand in summary.json.

    Args:
        out: the run folder.
        context: of the run.
        sets: the test sets by metric prefix.
        progress, timing: of the run.
    """

    def __init__(
        self, out: Path, context: RunContext, sets: dict[str, Reader], progress: Progress, timing: Timing
    ) -> None:
        self._out, self._context, self._sets, self._progress, self._timing = out, context, sets, progress, timing

    @classmethod
    def build(cls, run: RunObjects) -> Results:
        return cls(run.out, run.context, run.sets, run.progress, run.timing)

    def finish(self, summary: Summary) -> None:
        context, config, done = self._context, self._context.config, self._progress.done
        names = context.data.client_names
        write_evaluation(
            self._out, rows(summary.of_tests, [*self._sets], summary.of_clients, names, summary.client_set)
        )
        flat = context.is_flat(summary.network)
        write_model(self._out / MODEL, summary.network, about_network(context, config, done, flat))
        first: dict[str, Any] = {
            "method": config.method, "data": config.data, "model": context.model_name, "seed": config.seed,
            "rounds": done, "clients": config.clients, **self._names(), "metrics": summary.metrics,
        }  # fmt: skip
        last = {"seconds": self._timing.seconds(), "records": config.records, "versions": versions.versions()}
        if summary.stop is not None:
            last["stopped"] = {"by": summary.stop.name, "reason": summary.stop.reason}
        summary.entries = {**first, **summary.entries, **last}
        records.write_summary(self._out, summary.entries)

    def _names(self) -> dict[str, Any]:
        """The clients' names as entries of the summary; empty where they have none."""
        data = self._context.data
        if data.client_names is None:
            return {}
        holdout = {} if data.statistics.held_out is None else {"held_out_client_name": data.statistics.held_out[0]}
        return {"client_names": list(data.client_names), **holdout}
