"""Warnings of a run: every name is told once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedkern.engine.context import RunContext
from fedkern.engine.parts.base import Part, Record, Summary
from fedkern.engine.registry import register_part
from fedkern.engine.run_objects import RunObjects
from fedkern.listeners.listener_group import ListenerGroup


@register_part("warnings")
class Warnings(Part):
    """Tells the listeners the warnings of a round at its end.

    Args:
        context: takes warnings.
        listener: told of them.
    """

    def __init__(self, context: RunContext, listener: ListenerGroup) -> None:
        self._context, self._listener = context, listener
        self._told: set[str] = set()

    @classmethod
    def build(cls, run: RunObjects) -> Warnings:
        return cls(run.context, run.listener)

    def round_end(self, record: Record) -> None:
        if not record.entry.one_off:
            self._tell()

    def finish(self, summary: Summary) -> None:
        self._tell()
        summary.entries["diagnostics"] = self._context.warnings

    def state(self) -> dict[str, Any]:
        return dict(self._context.warnings)

    def restore(self, state: Mapping[str, Any]) -> None:
        self._context.warnings = {**state, **self._context.warnings}
        self._told = {name for name, text in state.items() if text == self._context.warnings[name]}

    def _tell(self) -> None:
        for name, text in self._listener.warnings.items():  # told already, to the listeners that are left
            self._context.warn(name, text)
            self._told.add(name)
        for name, text in self._context.warnings.items():
            if name not in self._told:
                self._told.add(name)
                self._listener.on_warning(name, text)
