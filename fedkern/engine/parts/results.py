"""Final files of a run: evaluation.csv, the model, summary.json."""

from fedkern.engine.parts.part import RunPart, Summary, register_part
from fedkern.engine.store import record_files
from fedkern.engine.store.record_files import rows, write_evaluation
from fedkern.engine.store.run_folder import MODEL, about_network, write_model
from fedkern.messages.states import State
from fedkern.process import versions


@register_part("results")
class Results(RunPart):
    """Part that writes the results, and puts them into the summary as in summary.json."""

    def finish(self, summary: Summary) -> None:
        run, context, config, done = self._run, self._run.context, self._run.config, self._run.progress.done
        names, held_out = context.data.client_names, context.data.statistics.held_out
        holdout = {} if held_out is None else {"held_out_client_name": held_out[0]}
        of_clients = {} if names is None else {"client_names": list(names), **holdout}
        write_evaluation(run.out, rows(summary.of_tests, [*run.sets], summary.of_clients, names, summary.client_set))
        flat = context.networks.is_flat(summary.network)
        write_model(run.out / MODEL, summary.network, about_network(context, config, done, flat))
        head: State = {
            "method": config.method, "data": config.data, "model": context.networks.model_name, "seed": config.seed,
            "rounds": done, "clients": config.clients, **of_clients, "metrics": summary.metrics,
        }  # fmt: skip
        tail = {"seconds": run.timing.seconds(), "records": config.records, "versions": versions.versions()}
        if summary.stop is not None:
            tail["stopped"] = {"by": summary.stop.name, "reason": summary.stop.reason}
        summary.entries = {**head, **summary.entries, **tail}
        record_files.write_summary(run.out, summary.entries)
