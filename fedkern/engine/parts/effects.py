"""Settings that the user gave and that have no effect: the run ends before its first communication round is kept."""

from __future__ import annotations

from collections.abc import Mapping

from fedkern.engine.marks import unused, unused_defaults
from fedkern.engine.parts.base import Part, Record
from fedkern.engine.registry import register_part
from fedkern.engine.run_objects import RunObjects
from fedkern.errors import NoEffect


@register_part("effects")
class Effects(Part):
    """Refuses a run whose user gave settings that nothing has used in the first communication round.

    In a comparison, whose settings are for all its methods, these and unused defaults are a warning.
    """

    def __init__(self, run: RunObjects) -> None:
        self._run, self._given, self._common = run, run.config.asked, run.config.common
        if any(entry.participants == "sampled" for entry in run.plan if not entry.one_off):
            run.log.marks.add("drawn")

    @classmethod
    def build(cls, run: RunObjects) -> Effects | None:
        begun = run.entry is not None  # whose checkpoint tells what was given
        return cls(run) if begun or run.config.asked or run.config.common is not None else None

    def round_end(self, record: Record) -> None:
        run = self._run
        if record.entry.one_off or run.progress.done != 1:
            return
        marks = self._marks()
        for sentence in unused(run.config, self._given, marks):
            raise NoEffect(sentence)
        if self._common is not None:
            texts = [*unused(run.config, self._common, marks), unused_defaults(run.config, self._common, marks)]
            if text := " ".join(filter(None, texts)):
                run.context.warn("no-effect", text)

    def state(self) -> dict[str, list[str]]:
        if self._run.progress.done:
            return {}
        common = {} if self._common is None else {"common": sorted(self._common)}
        return {"marks": sorted(self._marks()), "given": sorted(self._given), **common}

    def _marks(self) -> set[str]:
        server = self._run.server
        rules = {"average": server.aggregator, "server_step": server.optimiser}
        return self._run.log.marks | server.marks | {name for name, rule in rules.items() if rule and rule.used}

    def restore(self, state: Mapping[str, list[str]]) -> None:
        self._run.log.marks.update(state["marks"])
        self._given = frozenset(state["given"])
        self._common = frozenset(state["common"]) if "common" in state else None
