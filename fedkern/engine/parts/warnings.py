"""Warnings of a run, one of each name."""

from fedkern.engine.parts.part import Record, RunPart, Summary, register_part
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.messages.states import State


@register_part("warnings")
class Warnings(RunPart):
    """Part that passes a round's warnings to the listeners at its end."""

    def __init__(self, run: RunObjects) -> None:
        super().__init__(run)
        self._told: set[str] = set()

    def round_end(self, record: Record) -> None:
        if not record.entry.one_off:
            self._tell()

    def finish(self, summary: Summary) -> None:
        self._tell()
        summary.entries["diagnostics"] = self._run.notices.warnings

    def state(self) -> State:
        return dict(self._run.notices.warnings)

    def restore(self, state: State) -> None:
        self._run.notices.warnings = {**state, **self._run.notices.warnings}
        self._told = {name for name, text in state.items() if text == self._run.notices.warnings[name]}

    def _tell(self) -> None:
        for name, text in self._run.listener.warnings.items():  # already passed to the remaining listeners
            self._run.notices.warn(name, text)
            self._told.add(name)
        for name, text in self._run.notices.warnings.items():
            if name not in self._told:
                self._told.add(name)
                self._run.listener.on_warning(name, text)
