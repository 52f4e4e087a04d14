"""Figures that the method's server reports of a round (``server.report``)."""

import math

from fedkern.engine.context import convert_figures
from fedkern.engine.parts.part import Record, RunPart, Summary, register_part
from fedkern.messages.states import State
from fedkern.privacy.guarantee import About
from fedkern.tasks.figure_names import FIGURE_NAMES, RECORD_NAMES


@register_part("server")
class ServerFigures(RunPart):
    """Part that puts the server's public figures into records and summary."""

    def round_end(self, record: Record) -> None:
        if record.entry.one_off:
            return
        report, told = self._run.server.report, self._run.notices.disclosure.filter_entries(record.entries)
        taken = {*told, *RECORD_NAMES, *(FIGURE_NAMES & report.keys())}
        for name, value in convert_figures(report, "server.report", taken).items():
            report[name] = float(value)
        record.put(report, About.SERVER)

    def finish(self, summary: Summary) -> None:
        entries = {name: (About.SERVER, value) for name, value in self._run.server.report.items()}
        summary.metrics.update(self._run.notices.disclosure.filter_entries(entries))

    def state(self) -> State:
        return dict(self._run.server.report)

    def restore(self, state: State) -> None:
        # JSON has no NaN or infinity: such a value is None in a checkpoint.
        self._run.server.report = {name: math.nan if value is None else value for name, value in state.items()}
