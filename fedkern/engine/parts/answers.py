"""The final network's answers on the test sets: confusion matrices, and ``predictions.csv`` where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedkern.engine.context import RunContext
from fedkern.engine.parts.base import Part, Summary
from fedkern.engine.reader import Reader
from fedkern.engine.registry import register_part
from fedkern.engine.run_objects import RunObjects
from fedkern.engine.store import confusions, predictions
from fedkern.methods.common.final_figures import answers, set_name, unique_names


@register_part("answers")
class Answers(Part):
    """Writes what the test sets have kept.

    Args:
        out: the run folder.
        context: of the run.
        sets: the test sets by metric prefix.
        alone: raises where another process has taken over the folder.
        counts: whether numbers of images may be told.
        each: whether ``predictions.csv`` is written.
    """

    def __init__(
        self,
        out: Path,
        context: RunContext,
        sets: dict[str, Reader],
        alone: Callable[[], object],
        *,
        counts: bool,
        each: bool,
    ) -> None:
        self._out, self._context, self._sets, self._alone = out, context, sets, alone
        self._counts, self._each = counts, each

    @classmethod
    def build(cls, run: RunObjects) -> Answers:
        counts = run.context.disclosure.clients
        return cls(run.out, run.context, run.sets, run.alone, counts=counts, each=run.predictions)

    def finish(self, summary: Summary) -> None:
        self._alone()
        if self._counts and summary.final.confusion:
            confusions.write(self._out, self._context.data.classes, summary.final.confusion)
        if self._each:
            self._write_predictions()

    def _write_predictions(self) -> None:
        classes = unique_names(self._context.data.classes)
        sets = {
            set_name(prefix): (data.split.ids, data.labels.cpu(), answers(data, len(classes)))
            for prefix, data in self._sets.items()
        }
        if any(logits for _, _, logits in sets.values()):
            predictions.write(self._out, classes, sets)
        else:
            method = self._context.config.method
            why = f"the figures of {method} come from code of its own, which hands on no logits"
            self._context.warn("no-predictions", f"{predictions.FILE} was not written: {why}.")
