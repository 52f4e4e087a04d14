"""What the server shows of a round (``Server.log_image``): pictures that the run keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedkern.engine.parts.base import Part, Record
from fedkern.engine.progress import Progress
from fedkern.engine.registry import register_part
from fedkern.engine.run_objects import RunObjects
from fedkern.engine.server import Server
from fedkern.engine.store.artifacts import Artifact, ArtifactLog


@register_part("artifacts")
class Artifacts(Part):
    """Has the server show some rounds, evenly over the run, and keeps what it shows.

    Args:
        server: the server.
        log: where they are kept.
        progress: of the run.
        public: whether what the server computes may be told.
    """

    def __init__(self, server: Server, log: ArtifactLog, progress: Progress, public: bool) -> None:
        self._server, self._log, self._progress, self._told = server, log, progress, public

    @classmethod
    def build(cls, run: RunObjects) -> Artifacts:
        return cls(run.server, ArtifactLog(run.out, run.rounds), run.progress, run.context.disclosure.server)

    def before_round(self, record: Record) -> None:
        self._server.showing = self._told and not record.entry.one_off and self._log.wants(record.number)

    def round_end(self, record: Record) -> None:
        for name, (value, axes) in self._server.artifacts.items():
            self._log.add(Artifact(name, record.number, value, axes))
        self._server.artifacts.clear()

    def state(self) -> dict[str, Any]:
        self._log.write()
        return {"sha256": self._log.digest}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._log.restore(self._progress.done, state["sha256"])
