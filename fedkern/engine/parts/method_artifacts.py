"""Pictures that the server shows of a round (``Server.log_image``), kept by the run."""

from fedkern.engine.parts.part import Record, RunPart, register_part
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.store.artifacts import Artifact, ArtifactLog
from fedkern.messages.states import State


@register_part("artifacts")
class Artifacts(RunPart):
    """Part that lets the server show some rounds, evenly over the run, and keeps the pictures."""

    def __init__(self, run: RunObjects) -> None:
        super().__init__(run)
        self._log = ArtifactLog(run.out, run.rounds)

    def before_round(self, record: Record) -> None:
        told = self._run.notices.disclosure.server
        self._run.server.showing = told and not record.entry.one_off and self._log.wants(record.number)

    def round_end(self, record: Record) -> None:
        for name, (value, axes) in self._run.server.artifacts.items():
            self._log.add(Artifact(name, record.number, value, axes))
        self._run.server.artifacts.clear()

    def state(self) -> State:
        self._log.write()
        return {"sha256": self._log.digest}

    def restore(self, state: State) -> None:
        self._log.restore(self._run.progress.done, state["sha256"])
