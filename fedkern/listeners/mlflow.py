"""A run's losses and metrics as a run of MLflow (``--mlflow EXPERIMENT``)."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkern.errors import UserError
from fedkern.listeners.events import RunInfo
from fedkern.listeners.tracker import Tracker, reason
from fedkern.process.extras import import_extra
from fedkern.settings.config import flatten_table

LOGGED = "fedkern.round"
"""Tag of MLflow's run that holds the last logged round."""
REFUSED = re.compile(r"[^\w/.: -]")
"""Characters that MLflow refuses in names."""
LONGEST = 6000
"""MLflow's limit for the value of a parameter, in characters."""


def check() -> Any:
    """Return the module ``mlflow``, or raise UserError if not installed."""
    return import_extra("MLflow (--mlflow) needs mlflow", "mlflow", "mlflow")


class MLflow(Tracker):
    """Logs every communication round's figures to MLflow, with the round as ``step``.

    Metrics have the tags of :class:`TensorBoard`. The settings of the run are the parameters, and MLflow gets nothing
    about the machine. MLflow reads its environment variables itself: ``MLFLOW_TRACKING_URI`` names the server or the
    folder, and without it MLflow writes into the current folder.

    The checkpoint keeps the id of MLflow's run, so that a resumed run continues the same curve. Rounds that the
    interrupted run logged after its last checkpoint are not logged again.

    Args:
        experiment: name of MLflow's experiment, which is made if it is new.

    Raises:
        UserError: the package mlflow is not installed, or ``experiment`` is empty.
    """

    def __init__(self, experiment: str) -> None:
        if not isinstance(experiment, str) or not experiment.strip():
            raise UserError("MLflow needs the name of an experiment: MLflow(EXPERIMENT), or --mlflow EXPERIMENT.")
        super().__init__(experiment.strip())
        self._mlflow = check()

    def on_start(self, run: RunInfo) -> None:
        try:
            self._client = client = self._mlflow.MlflowClient()
            if self._id is None:
                experiment = client.get_experiment_by_name(self._place)
                number = client.create_experiment(self._place) if experiment is None else experiment.experiment_id
                self._id = str(client.create_run(number, run_name=Path(run.out).name).info.run_id)
                settings = flatten_table(run.config.to_publish()).items()
                make = self._mlflow.entities.Param
                client.log_batch(
                    self._id, params=[make(REFUSED.sub("_", name), str(value)[:LONGEST]) for name, value in settings]
                )
            else:
                self._logged = int(client.get_run(self._id).data.tags.get(LOGGED, 0))
                client.update_run(self._id, status="RUNNING")
        except self._mlflow.MlflowException as error:
            raise UserError(
                f"MLflow cannot open the experiment {self._place} ({reason(error)}): put that right, name another "
                "experiment, or leave --mlflow out."
            ) from None
        self._sets, self._is_open = run.test_sets, True

    def _log(self, figures: Mapping[str, float], number: int) -> None:
        entities, timestamp = self._mlflow.entities, int(1000 * time.time())
        metrics = [entities.Metric(REFUSED.sub("_", tag), value, timestamp, number) for tag, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics, tags=[entities.RunTag(LOGGED, str(number))])

    def _finish(self, figures: Mapping[str, float] | None, number: int) -> None:
        if figures is not None:
            self._log(figures, number)
        self._client.set_terminated(self._id, "FAILED" if figures is None else "FINISHED")
