"""Figures that only an experimenter can have, who sees all clients (``Method.oracle_metrics``)."""

from __future__ import annotations

from fedkern.engine.clients import AllClients
from fedkern.engine.hooks import MethodCode
from fedkern.engine.node import figures
from fedkern.engine.parts.base import Part, Summary
from fedkern.engine.reader import Reader
from fedkern.engine.registry import register_part
from fedkern.engine.run_objects import RunObjects
from fedkern.engine.server import Server
from fedkern.methods.base import Method
from fedkern.privacy.disclosure import Disclosure


@register_part("oracle")
class Oracle(Part):
    """Adds these figures to the summary.

    Args:
        method, server: give the figures.
        code: names the method in an exception.
        clients: all clients of the run.
        sets: the test sets by metric prefix.
        disclosure: which figures may be told.
    """

    def __init__(
        self,
        method: Method,
        server: Server,
        code: MethodCode,
        clients: AllClients,
        sets: dict[str, Reader],
        disclosure: Disclosure,
    ) -> None:
        self._method, self._server, self._code, self._clients = method, server, code, clients
        self._sets, self._disclosure = sets, disclosure

    @classmethod
    def build(cls, run: RunObjects) -> Oracle | None:
        if run.remote:
            return None
        clients = AllClients(run.context, run.checkpoints)
        return cls(run.method, run.server, run.code, clients, run.sets, run.context.disclosure)

    def finish(self, summary: Summary) -> None:
        if self._disclosure.appraised is not None and not self._disclosure.appraised:
            return
        with self._code("oracle_metrics"):
            metrics = self._method.oracle_metrics(self._server, self._clients, self._sets)
        metrics = figures(metrics, "oracle_metrics")
        summary.metrics.update(self._disclosure.oracle_metrics(metrics, ("", *self._sets)))
