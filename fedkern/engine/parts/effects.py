"""Settings of the user without effect, which end the run in its first round."""

from collections.abc import Mapping

from fedkern.engine.marks import comparison_notes, find_unused
from fedkern.engine.parts.part import Part, Record, RunPart, register_part
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.errors import NoEffect


@register_part("effects")
class Effects(RunPart):
    """Part that refuses a run with given settings that nothing has used in the first communication round.

    In a comparison, whose settings are for all methods, these and unused defaults are a warning.
    """

    def __init__(self, run: RunObjects) -> None:
        super().__init__(run)
        self._given = run.config.asked
        if any(entry.participants == "sampled" for entry in run.plan if not entry.one_off):
            run.log.marks.add("drawn")

    @classmethod
    def build(cls, run: RunObjects) -> Part | None:
        begun = run.store.entry is not None  # its checkpoint lists the given settings
        config = run.config
        return cls(run) if begun or config.asked or config.training or config.common is not None else None

    def round_end(self, record: Record) -> None:
        config, marks = self._run.config, self._marks()
        if record.entry.one_off or self._run.progress.done != 1:
            return
        for sentence in find_unused(config, self._given, marks):
            raise NoEffect(sentence)
        if config.common is not None and (text := " ".join(comparison_notes(config, config.common, marks))):
            self._run.notices.warn("no-effect", text)

    def state(self) -> dict[str, list[str]]:
        return {} if self._run.progress.done else {"marks": sorted(self._marks()), "given": sorted(self._given)}

    def _marks(self) -> set[str]:
        server = self._run.server
        rules = {"average": server.aggregator, "server_step": server.optimiser}
        return self._run.log.marks | server.marks | {name for name, rule in rules.items() if rule and rule.used}

    def restore(self, state: Mapping[str, list[str]]) -> None:
        self._run.log.marks.update(state["marks"])
        self._given = frozenset(state["given"])
