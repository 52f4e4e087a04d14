"""A run's losses and metrics as a run of Weights & Biases (``--wandb PROJECT``)."""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.files.filesystem import read_json
from fedkern.listeners.events import RunInfo
from fedkern.listeners.tracker import Tracker, reason
from fedkern.process.extras import import_extra

FOLDER, LOGGED = "wandb", "fedkern.json"
"""wandb's folder in the run folder, and its file with the last logged round."""


def check() -> Any:
    """Return the module ``wandb``, or raise UserError if not installed."""
    return import_extra("Weights & Biases (--wandb) needs wandb", "wandb", "wandb")


class WandB(Tracker):
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
        super().__init__(project.strip())
        self._wandb, self._quiet = check(), quiet
        self._run: Any = None
        self._folder = Path()
        self._made = False  # whether this run made the folder

    def on_start(self, run: RunInfo) -> None:
        resumed, self._id = self._id, self._id or uuid.uuid4().hex[:8]
        self._folder = Path(run.out) / FOLDER
        self._made = not self._folder.exists()
        if not self._made:
            atomic.make_folder(self._folder)  # raises where the folder is a link
        self._logged = _last(self._folder / LOGGED, self._id) if resumed else 0
        # wandb must not take over the terminal, on which the progress is displayed.
        settings: dict[str, Any] = {"console": "off", "silent": self._quiet}
        if run.private:
            settings |= {"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True}
        entity, _, project = self._place.rpartition("/")
        try:
            self._run = self._wandb.init(
                id=self._id, resume="allow", project=project, entity=entity or None, name=Path(run.out).name,
                dir=str(run.out), config=run.config.to_publish(), settings=settings,
            )  # fmt: skip
        except self._wandb.Error as error:
            raise UserError(
                f"wandb cannot open the project {self._place} ({reason(error)}): put that right, set "
                "WANDB_MODE=offline, or leave --wandb out."
            ) from None
        self._sets, self._is_open = run.test_sets, True

    def _log(self, figures: Mapping[str, float], number: int) -> None:
        self._run.log(figures, step=number)
        atomic.make_folder(self._folder)
        atomic.write_bytes(self._folder / LOGGED, json.dumps({"id": self._id, "round": number}).encode())

    def _finish(self, figures: Mapping[str, float] | None, number: int) -> None:
        for tag, value in (figures or {}).items():
            self._run.summary[tag] = value
        self._run.finish(exit_code=int(figures is None))
        if self._made and self._logged == 0:
            shutil.rmtree(self._folder, ignore_errors=True)  # a run that did no round leaves nothing


def _last(file: Path, id: str) -> int:
    """Return the last round logged to the run of that id, 0 if unknown."""
    try:
        state = read_json(file)
    except (OSError, ValueError):
        return 0
    valid = isinstance(state, dict) and state.get("id") == id and type(state.get("round")) is int
    return int(state["round"]) if valid else 0
