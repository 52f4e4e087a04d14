"""A run's losses and metrics as a run of Weights & Biases (``--wandb PROJECT``)."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.files.filesystem import read_json
from fedkern.listeners.events import Listener, RunInfo, scalars
from fedkern.process.extras import import_extra

FOLDER, LOGGED = "wandb", "fedkern.json"
"""wandb's folder in the run folder, and its file with the last logged round."""


def check() -> Any:
    """Return the module ``wandb``, or raise UserError if not installed."""
    return import_extra("Weights & Biases (--wandb) needs wandb", "wandb", "wandb")


class WandB(Listener):
    """Logs every communication round's figures to Weights & Biases, with the round as ``step``.

    Tags are those of :class:`TensorBoard`. The settings of the run are the config, the final figures the summary, under
    ``final/``. wandb's own files are in ``<run folder>/wandb``. wandb reads its environment variables itself. With
    ``WANDB_MODE=offline`` nothing leaves the machine.

    The checkpoint keeps the id of wandb's run, so that a resumed run continues the same curve. Rounds that the
    interrupted run logged after its last checkpoint are not logged again.

    For a run with private records, wandb gets the figures of metrics.jsonl and the settings, but nothing that wandb
    itself finds out about the machine.

    Args:
        project: ``PROJECT`` or ``ENTITY/PROJECT``.
        quiet: whether wandb prints nothing.

    Raises:
        UserError: the package wandb is not installed, or ``project`` is empty.
    """

    def __init__(self, project: str, *, quiet: bool = False) -> None:
        if not isinstance(project, str) or not project.strip("/ "):
            raise UserError("Weights & Biases needs the name of a project: WandB(PROJECT), or --wandb PROJECT.")
        self._wandb = check()
        self._project, self._quiet = project.strip(), quiet
        self._id: str | None = None
        self._run: Any = None
        self._logged = 0
        self._sets: Collection[str] = ()
        self._folder: Path | None = None
        self._made = False  # whether this run made the folder

    def state(self) -> dict[str, Any]:
        return {} if self._id is None else {"project": self._project, "id": self._id}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state.get("project") == self._project:
            self._id = str(state["id"])

    def on_start(self, run: RunInfo) -> None:
        resumed, self._id = self._id, self._id or uuid.uuid4().hex[:8]
        self._folder, self._sets = Path(run.out) / FOLDER, run.test_sets
        self._made = not self._folder.exists()
        if not self._made:
            atomic.make_folder(self._folder)  # raises where the folder is a link
        self._logged = _last(self._folder / LOGGED, self._id) if resumed else 0
        # wandb must not take over the terminal, on which the progress is displayed.
        settings: dict[str, Any] = {"console": "off", "silent": self._quiet}
        if run.private:
            settings |= {"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True}
        entity, _, project = self._project.rpartition("/")
        try:
            self._run = self._wandb.init(
                id=self._id, resume="allow", project=project, entity=entity or None, name=Path(run.out).name,
                dir=str(run.out), config=run.config.to_publish(), settings=settings,
            )  # fmt: skip
        except self._wandb.Error as error:
            why = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"wandb cannot open the project {self._project} ({why}): put that right, set WANDB_MODE=offline, or "
                "leave --wandb out."
            ) from None

    def on_round(self, record: Mapping[str, Any]) -> None:
        number = int(record["round"])
        if self._run is None or self._folder is None or number <= self._logged:
            return
        self._run.log(scalars(record, self._sets), step=number)
        self._logged = number
        atomic.make_folder(self._folder)
        atomic.write_bytes(self._folder / LOGGED, json.dumps({"id": self._id, "round": number}).encode())

    def on_end(self, summary: Mapping[str, Any]) -> None:
        if self._run is not None:  # None: the run had finished before
            for tag, value in scalars(summary["metrics"], self._sets).items():
                self._run.summary[f"final/{tag}"] = value
            self._finish(0)

    def close(self) -> None:
        """End wandb's run, which then counts as failed. Does nothing after :meth:`on_end`."""
        self._finish(1)
        if self._folder is not None and self._made and self._logged == 0:
            shutil.rmtree(self._folder, ignore_errors=True)  # a run that did no round leaves nothing
        self._folder = None

    def _finish(self, code: int) -> None:
        run, self._run, self._id = self._run, None, None
        if run is not None:
            run.finish(exit_code=code)


def _last(file: Path, id: str) -> int:
    """Return the last round logged to the run of that id, 0 if unknown."""
    try:
        state = read_json(file)
    except (OSError, ValueError):
        return 0
    valid = isinstance(state, dict) and state.get("id") == id and type(state.get("round")) is int
    return int(state["round"]) if valid else 0
