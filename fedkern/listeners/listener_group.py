"""The listeners of a run: their errors do not end the run, and checkpoints keep their states."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

from fedkern.errors import RAISED, UserError, describe_error, error_origin, user_message
from fedkern.listeners.events import Listener, Listeners, RunInfo
from fedkern.usercode.named_code import host_code


class ListenerGroup(Listeners):
    """Passes the events of a run to its listeners, including each one of a :class:`Listeners`.

    A listener that raises is left out with a warning. Three errors pass: an exception that code does not raise by
    mistake, such as ``KeyboardInterrupt``, an error of an ``essential`` listener, and a :class:`UserError` of
    ``restore`` or ``on_start``, when nothing of a run can be lost yet.
    """

    def __init__(self, listener: Listener) -> None:
        super().__init__(*_parts(listener))
        self._whole = listener if type(listener) is Listeners else None
        self._present = [*self.listeners]
        self._names: dict[int, str] = {}
        for member in self._present:
            self._names[id(member)] = _number_name(type(member).__name__, self._names.values())
        self._states: dict[str, dict[str, Any]] = {}
        self._when = ""
        self.warnings: dict[str, str] = {}

    def _each(self, hook: str, call: Callable[[Listener], object], *, early: bool = False) -> None:
        """Call every listener. ``early``: a UserError ends the run."""
        for member in [*self._present]:
            if member not in self._present:  # a warning about another listener was too much for this one
                continue
            if getattr(getattr(member, hook), "__func__", None) is getattr(Listener, hook):
                continue
            try:
                with host_code():
                    call(member)
            except RAISED as error:
                if member.essential or (early and isinstance(error, UserError)):
                    raise
                self._leave_out(member, hook, error)

    def _leave_out(self, listener: Listener, hook: str, error: BaseException) -> None:
        self._present.remove(listener)
        label = self._names[id(listener)]
        reason = (user_message(error) or describe_error(error)).rstrip(".")
        name = f"listener-{label}"
        where = f"{label}{error_origin(error, type(listener))} failed in {hook}{self._when}"
        text = f"The listener {where} ({reason}): the run goes on without it."
        self.warnings[name] = text
        self.on_warning(name, text)
        if hook != "close":
            with suppress(*RAISED), host_code():  # the listener is broken, and its first error was reported
                listener.close()

    def restore_all(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Restore every listener's state. States of absent listeners stay for a later resumption."""
        self._states = dict(states)

        def give(member: Listener) -> None:
            if (name := self._names[id(member)]) in self._states:
                member.restore(deepcopy(self._states[name]))

        self._each("restore", give, early=True)

    def states(self) -> dict[str, dict[str, Any]]:
        """Return the states of all listeners by name, the last one of a listener that was left out."""

        def ask(member: Listener) -> None:
            state = member.state()
            if not isinstance(state, dict) or json.loads(json.dumps(state, allow_nan=False)) != state:
                raise TypeError("a state must be a dict of texts, numbers, lists and such dicts, with texts as keys")
            name = self._names[id(member)]
            if state:
                self._states[name] = json.loads(json.dumps(state))
            else:
                self._states.pop(name, None)

        self._each("state", ask)
        return dict(self._states)

    def on_start(self, run: RunInfo) -> None:
        if self._whole is not None:
            self._whole.info = run
        super().on_start(run)

    def on_round_start(self, round: int, name: str, participants: Sequence[int]) -> None:
        self._when = f" in round {round}" if round > 0 else ""
        super().on_round_start(round, name, participants)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._when = ""
        super().on_end(summary)


def _parts(listener: Listener) -> Iterator[Listener]:
    if type(listener) is not Listeners:
        yield listener
        return
    for member in listener.listeners:
        yield from _parts(member)


def _number_name(name: str, names: Iterable[str]) -> str:
    taken, candidate, number = set(names), name, 2
    while candidate in taken:
        candidate, number = f"{name}-{number}", number + 1
    return candidate
