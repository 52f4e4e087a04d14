"""Events of a run for its listeners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedkern.engine.parts.base import Part, Record
from fedkern.listeners.audience import Audience
from fedkern.listeners.events import RunInfo


class Listening(Part):
    """Tells the listeners what happens, and keeps their states.

    Args:
        listener: the listeners.
        info: gives what is known before the first round.
    """

    name = "listeners"

    def __init__(self, listener: Audience, info: Callable[[], RunInfo]) -> None:
        self._listener, self._info = listener, info

    def begin(self, resumed: bool) -> None:
        self._listener.on_start(self._info())

    def before_round(self, record: Record) -> None:
        self._listener.on_round_start(record.number, record.entry.name, record.participants)
        if record.entry.one_off and record.entry.trains:
            self._listener.on_notice(f"set-up: {record.entry.trains}")

    def round_end(self, record: Record) -> None:
        if not record.entry.one_off:
            self._listener.on_round(record.told)

    def state(self) -> dict[str, Any]:
        return self._listener.states()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._listener.restore_all(state)
