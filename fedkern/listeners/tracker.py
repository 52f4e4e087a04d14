"""Base of listeners that log a run's figures to another program, as one curve over all resumptions."""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from fedkern.errors import describe_error
from fedkern.listeners.events import Listener, scalars


class Tracker(Listener):
    """Logs every communication round's figures to a place that the user names, with the round as ``step``.

    ``on_start`` of a subclass opens a curve, or continues that of ``_id``, and then sets ``_is_open`` and ``_sets``.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._id: str | None = None
        self._is_open = False  # not in a run that had finished before
        self._logged = 0
        self._sets: Collection[str] = ()

    @abstractmethod
    def _log(self, figures: Mapping[str, float], number: int) -> None:
        """Log the figures of a round by tag."""

    @abstractmethod
    def _finish(self, figures: Mapping[str, float] | None, number: int) -> None:
        """End the curve, with the final figures by tag. Without figures the run has failed."""

    def state(self) -> dict[str, Any]:
        return {} if self._id is None else {"place": self._place, "id": self._id}

    def restore(self, state: Mapping[str, object]) -> None:
        if state.get("place") == self._place:
            self._id = str(state["id"])

    def on_round(self, record: Mapping[str, Any]) -> None:
        number = int(record["round"])
        if self._is_open and number > self._logged:
            self._log(scalars(record, self._sets), number)
            self._logged = number

    def on_end(self, summary: Mapping[str, Any]) -> None:
        figures = scalars(summary["metrics"], self._sets)
        self._end({f"final/{tag}": value for tag, value in figures.items()}, int(summary["rounds"]))

    def close(self) -> None:
        """End the curve, which then counts as failed. Does nothing after :meth:`on_end`."""
        self._end(None, 0)

    def _end(self, figures: Mapping[str, float] | None, number: int) -> None:
        if self._is_open:
            self._is_open = False
            self._finish(figures, number)
            self._id = None


def reason(error: Exception) -> str:
    """Return an error of another program as a clause."""
    return " ".join(str(error).split()).rstrip(".") or describe_error(error)
