"""A run's losses and metrics as TensorBoard event files (``--tensorboard``)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.listeners.events import Listener, RunInfo, scalars
from fedkern.process.extras import import_extra

FOLDER = "tensorboard"


def check() -> Any:
    """Return the class ``torch.utils.tensorboard.SummaryWriter``, or raise UserError if not installed."""
    purpose = "TensorBoard files (--tensorboard) need tensorboard"
    return import_extra(purpose, "tensorboard", "torch.utils.tensorboard").SummaryWriter


class TensorBoard(Listener):
    """Writes every communication round's figures into ``<run folder>/tensorboard``.

    Metrics and losses keep their names, with the test set before a slash (``id/accuracy``). Under ``clients/`` are the
    clients' figures, averaged over the clients of the round, under ``run/`` times and bytes, under ``final/`` the
    summary's figures. A resumed run hides the figures that the interrupted run wrote after its last checkpoint.

    Raises:
        UserError: the package tensorboard is not installed.
    """

    def __init__(self) -> None:
        self._make = check()
        self._writer: Any = None
        self._run: RunInfo | None = None

    def on_start(self, run: RunInfo) -> None:
        self._run = run

    def _open(self, run: RunInfo) -> Any:
        # Opened with the first figure, so that a run that fails before it leaves no folder.
        if self._writer is None:
            folder = Path(run.out) / FOLDER
            atomic.make_folder(folder)
            try:
                # Hides earlier figures of the rounds to come, also those of a run without a checkpoint.
                self._writer = self._make(str(folder), purge_step=run.first_round + 1)
            except OSError as error:
                raise UserError(f"{folder} cannot be written: {error.strerror or error}.") from None
        return self._writer

    def on_round(self, record: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        writer = self._open(self._run)
        for tag, value in scalars(record, self._run.test_sets).items():
            writer.add_scalar(tag, value, int(record["round"]))
        writer.flush()

    def on_end(self, summary: Mapping[str, Any]) -> None:
        if self._run is not None:  # None: the run had finished before
            writer = self._open(self._run)
            for tag, value in scalars(summary["metrics"], self._run.test_sets).items():
                writer.add_scalar(f"final/{tag}", value, int(summary["rounds"]))
        self.close()

    def close(self) -> None:
        """Write pending figures. Safe to call twice."""
        if self._writer is not None:
            self._writer.close()
        self._writer = self._run = None
