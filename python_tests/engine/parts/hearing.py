"""A listener that notes its events, for parts that tell listeners."""

from fedkern.listeners.events import Listener


class Hearing(Listener):
    """A listener that notes its events.

    It fails in one of them, if asked.
    """

    def __init__(self, fails=""):
        self.events, self.kept, self._fails = [], {}, fails

    def _note(self, *event):
        self.events.append(event)
        if event[0] == self._fails:
            raise RuntimeError("the disk is full")

    def on_warning(self, name, text):
        self._note("warning", name, text)

    def on_start(self, run):
        self._note("start", run)

    def on_notice(self, text):
        self._note("notice", text)

    def on_round_start(self, round, name, participants):
        self._note("round start", round, name, participants)

    def on_round(self, record):
        self._note("round", record)

    def state(self):
        return dict(self.kept)

    def restore(self, state):
        self.kept = state
