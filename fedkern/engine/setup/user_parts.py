"""Construction of user-defined parts and filters, with checks and their names in errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import isfunction
from typing import Any

from fedkern.engine.hooks import MethodCode
from fedkern.engine.parts.part import Part, Stop
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.store.record_files import plain
from fedkern.engine.uploads.filters import ExchangeRequest, Filter
from fedkern.errors import UserError, format_value
from fedkern.methods.base import ClientId, Upload
from fedkern.tasks.figure_names import FIGURE_NAMES, RECORD_NAMES

_RETURNED: dict[str, tuple[type, str]] = {
    "before_round": (Stop, "a fedkern.Stop"),
    "round_end": (Stop, "a fedkern.Stop"),
    "decode": (str, "why the upload is refused"),
    "encoders": (Mapping, "encoders by client"),
    "state": (dict, "a dict"),
}
"""Types and descriptions of results besides None."""


def build(kind: Any, run: RunObjects) -> Any:
    """Return the part or filter of a user's class, or None, with its name in all its errors."""
    base = Part if issubclass(kind, Part) else Filter
    code = MethodCode(kind, kind.name, run.progress, base.__name__.lower())
    with code("build"):
        part = kind.build(run)
    if part is None:
        return None
    if not isinstance(part, base):
        due = f"a fedkern.{base.__name__} or None, not {format_value(part)}"
        raise UserError(f"`build` of the {base.__name__.lower()} {kind.name} must return {due}.")
    sees_one = base is Part or not (
        kind.keeps_client_state or kind.state is not Filter.state or kind.combine is not Filter.combine
    )
    if run.config.dp_noise and not sees_one:
        raise UserError(
            "--dp-noise assumes that what is added up of a client follows from its own data alone, and the filter "
            f"{kind.name} keeps state or sees all uploads at once: leave one of the two out."
        )
    own_entries: set[str] = set()
    for name, function in vars(base).items():
        if isfunction(function) and getattr(type(part), name) is not function:
            call = _combine if name == "combine" else partial(_call, name, own_entries)
            object.__setattr__(part, name, partial(call, code, getattr(part, name)))
    return part


def _call(
    name: str, own_entries: set[str], code: MethodCode, function: Callable[..., object], *arguments: Any, **more: object
) -> object:
    with code(name):
        entries = arguments[0].entries if name in ("before_round", "round_end") else {}
        before = dict(entries)
        value = function(*arguments, **more)
        written = {entry for entry, content in entries.items() if content is not before.get(entry)}
        taken = before.keys() | RECORD_NAMES | FIGURE_NAMES
        if clash := sorted((written - own_entries) & taken):
            raise UserError(f'the record has an entry "{clash[0]}" of its own: put the figure under another name')
        own_entries |= written
        kind, due = _RETURNED.get(name, (object, ""))
        if value is not None and not isinstance(value, kind):
            raise UserError(f"it must return {due} or nothing, not {format_value(value)}")
        if name == "state":
            _check_plain(value)
        return value


def _combine(
    code: MethodCode,
    function: Callable[..., Iterator[Upload]],
    asked: ExchangeRequest,
    uploads: Iterator[Upload],
    note: Callable[[ClientId, Mapping[str, float]], None],
) -> Iterator[Upload]:
    with code("combine"):
        answers = iter(function(asked, code.passing(uploads), note))
    while True:
        with code("combine"):
            handover = [next(answers, None)]  # without a reference here (see `fedkern.engine.rounds.exchange`)
        if handover[0] is None:
            return
        yield handover.pop()  # type: ignore[misc]


def _check_plain(state: object) -> None:
    try:
        json.dumps(plain(state or {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"a state holds numbers, texts, lists and dicts alone ({error})") from None
