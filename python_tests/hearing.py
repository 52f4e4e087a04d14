"""Listener that keeps the events of a run."""

from fedkern.listeners import Listener


class Hearing(Listener):
    """Listener that keeps the run's facts, notices, warnings, participants of every round, records and summary.

    Functions with the names of hooks replace the hooks.
    """

    def __init__(self, **hooks):
        self.__dict__.update(hooks)
        self.info, self.notices, self.told, self.drawn, self.records, self.summary = None, [], [], [], [], None

    @property
    def warnings(self):
        return dict(self.told)

    def on_start(self, run):
        self.info = run

    def on_notice(self, text):
        self.notices.append(text)

    def on_warning(self, name, text):
        self.told.append((name, text))

    def on_round_start(self, round, name, participants):
        self.drawn.append(list(participants))

    def on_round(self, record):
        self.records.append(record)

    def on_end(self, summary):
        self.summary = summary
