"""Differential privacy of a run: what its releases need before they begin, and its figures in records and summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedkern.engine.client_privacy import ClientPrivacy
from fedkern.engine.context import RunContext
from fedkern.engine.parts.base import Part, Record, Summary
from fedkern.engine.progress import Progress
from fedkern.engine.registry import register_part
from fedkern.engine.run_objects import RunObjects
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.releases import Releases
from fedkern.methods.common.privacy_report import privacy_figures
from fedkern.privacy import Guarantee, server_secret
from fedkern.privacy.guarantee import EPSILON, PART


@register_part("privacy")
class Privacy(Part):
    """Keeps the promises of a run that has a guarantee, or whole clients of which are private.

    Args:
        guarantee: the run's guarantee; None without noise.
        private: client-level privacy; None without it.
        releases: digests of what is released; None without a guarantee.
        context: of the run.
        checkpoints: have the clients' ledgers.
        progress: of the run.
        rounds: communication rounds of the plan.
    """

    def __init__(
        self,
        guarantee: Guarantee | None,
        private: ClientPrivacy | None,
        releases: Releases | None,
        context: RunContext,
        checkpoints: Checkpoints,
        progress: Progress,
        rounds: int,
    ) -> None:
        self._said, self._private, self._releases, self._context = guarantee, private, releases, context
        self._checkpoints, self._progress, self._rounds = checkpoints, progress, rounds
        self._before: Mapping[str, Any] = {}  # what the run was planned for when it was begun

    @classmethod
    def build(cls, run: RunObjects) -> Privacy:
        return cls(run.said, run.private, run.releases, run.context, run.checkpoints, run.progress, run.rounds)

    def begin(self, resumed: bool) -> None:
        if self._private is not None and self._before.get("rounds", self._rounds) != self._rounds:
            self._context.warn(
                "larger-epsilon",
                f"The run was planned for {self._before['rounds']} rounds with epsilon {self._before['epsilon']:.3g}: "
                f"its {self._rounds} rounds have epsilon {self._private.planned:.3g}.",
            )
        if self._releases is None:
            return
        self._releases.open(self._progress.planned)
        if self._private is not None and self._context.config.dp_draws == "secret":
            self._private.keep(server_secret.load_or_create(self._checkpoints.folder, begun=resumed))
        self._checkpoints.write_at_once()  # a release may leave a client only after its privacy cost is on disk

    def round_end(self, record: Record) -> None:
        if self._private is not None and not record.entry.one_off:
            record.put(self._private.spent(self._progress.done))

    def finish(self, summary: Summary) -> None:
        if self._private is not None:
            report = self._private.report(self._progress.done)
        else:
            clients = self._context.config.trained_clients
            report = privacy_figures(self._said, self._checkpoints.client_state, clients)
        summary.metrics.update({name: report[name] for name in (EPSILON, PART, "delta") if name in report})
        if report:
            summary.entries["privacy"] = report

    def state(self) -> dict[str, Any]:
        if self._private is None or self._said is None:
            return {}
        return {"rounds": self._rounds, "epsilon": self._private.planned}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._before = state
