"""Confusion matrices of the final network, and ``predictions.csv`` on request."""

from fedkern.engine.figures.final_figures import kept_answers, set_name, unique_names
from fedkern.engine.parts.part import RunPart, Summary, register_part
from fedkern.engine.store import confusions, predictions


@register_part("answers")
class Answers(RunPart):
    """Part that writes the answers kept by the test sets."""

    def finish(self, summary: Summary) -> None:
        run = self._run
        run.store.check_lock()
        if run.notices.disclosure.clients and summary.final.confusion:
            confusions.write(run.out, run.context.data.classes, summary.final.confusion)
        if not run.request.predictions:
            return
        classes = unique_names(run.context.data.classes)
        sets = {
            set_name(prefix): (data.split.ids, data.labels.cpu(), kept_answers(data, len(classes)))
            for prefix, data in run.sets.items()
        }
        if any(logits for _, _, logits in sets.values()):
            predictions.write(run.out, classes, sets)
        else:
            why = f"the figures of {run.config.method} come from code of its own, which hands on no logits"
            run.notices.warn("no-predictions", f"{predictions.FILE} was not written: {why}.")
