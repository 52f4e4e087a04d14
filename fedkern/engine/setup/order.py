"""Order of a run's parts and upload filters, by registered names, and construction of user-defined ones."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from inspect import isfunction
from pkgutil import iter_modules
from typing import Any

from fedkern.engine import parts, uploads
from fedkern.engine.hooks import MethodCode
from fedkern.engine.parts.part import PARTS, Part, Stop
from fedkern.engine.parts.part import register_part as register_part
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.store.record_files import plain
from fedkern.engine.uploads.filters import FILTERS, ExchangeRequest, Filter
from fedkern.engine.uploads.filters import register_filter as register_filter
from fedkern.errors import UserError, format_value
from fedkern.messages.states import State
from fedkern.methods.base import ClientId, Upload
from fedkern.tasks.figure_names import FIGURE_NAMES, RECORD_NAMES
from fedkern.usercode import plugins
from fedkern.usercode.registry import Registry

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
    name: str, own_entries: set[str], code: MethodCode, function: Callable[..., object], *args: Any, **kwargs: object
) -> object:
    with code(name):
        entries = args[0].entries if name in ("before_round", "round_end") else {}
        before = dict(entries)
        value = function(*args, **kwargs)
        written = {entry for entry, content in entries.items() if content is not before.get(entry)}
        taken = before.keys() | RECORD_NAMES | FIGURE_NAMES
        if clash := sorted((written - own_entries) & taken):
            raise UserError(f'the record has an entry "{clash[0]}" of its own: put the figure under another name')
        own_entries |= written
        kind, due = _RETURNED.get(name, (object, ""))
        if value is not None and not isinstance(value, kind):
            raise UserError(f"it must return {due} or nothing, not {format_value(value)}")
        if name == "state":
            try:
                json.dumps(plain(value or {}))
            except (TypeError, ValueError) as error:
                raise UserError(f"a state holds numbers, texts, lists and dicts alone ({error})") from None
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


USERS = "..."
"""Place of user-defined parts or filters."""
PART_ORDER = (
    "effects", "traffic", "artifacts", "evaluation", "server", "oracle", "privacy", USERS, "stop_at", "patience",
    "max_seconds", "max_bytes", "max_epsilon", "diagnoses", "answers", "records", "warnings", "listeners", "results",
    "trace", "checkpoints",
)  # fmt: skip
FILTER_ORDER = (
    "client_digests", "bytes", "reduction", "compress", USERS, "declared", "norm_bounds", "asynchronous",
    "private_mean", "server_digests",
)  # fmt: skip

for package in (parts, uploads):
    for module in iter_modules(package.__path__, f"{package.__name__}."):
        import_module(module.name)


def parts_of(run: RunObjects) -> list[Part]:
    return _build_all(PARTS, PART_ORDER, run)


def filters_of(run: RunObjects) -> list[Filter]:
    filters: list[Filter] = _build_all(FILTERS, FILTER_ORDER, run)
    needs_whole = any(filter_.needs_whole_upload for filter_ in filters)
    return [filter_ for filter_ in filters if not (needs_whole and filter_.keeps_on_device)]


def _build_all(table: Registry[Any], order: Sequence[str], run: RunObjects) -> list[Any]:
    user_names = [name for name in plugins.names_of_run(table, run.config.plugins) if name not in order]
    if lost := [table[name] for name in user_names if table[name].__module__.startswith("fedkern.")]:
        raise RuntimeError(f"{lost[0].__qualname__} has no place in a run: name it in {table.kind.upper()}_ORDER.")
    names = [entry for name in order for entry in (user_names if name == USERS else [name])]
    objects = (build(table[name], run) if name in user_names else table[name].build(run) for name in names)
    return [part for part in objects if part is not None]


def states_of(parts: Sequence[Part], filters: Sequence[Filter]) -> State:
    """Return the states of a run's parts and filters for a checkpoint.

    User-defined ones are listed even without a state, so that a resumed run requires them.
    """
    of_parts, of_filters = _states(parts, PART_ORDER), _states(filters, FILTER_ORDER)
    return {"parts": of_parts, **({"filters": of_filters} if of_filters else {})}


def _states(objects: Sequence[Part] | Sequence[Filter], order: Sequence[str]) -> State:
    return {part.name: state or {} for part in objects if (state := part.state()) or part.name not in order}


def restore(kind: str, objects: Sequence[Part] | Sequence[Filter], run: RunObjects) -> None:
    """Restore ``"parts"`` or ``"filters"`` of a run from its checkpoint, if there is one."""
    if run.store.entry is None:
        return
    states, names = run.store.entry["info"].get(kind, {}), [part.name for part in objects]
    for name in sorted(({*states} ^ {*names}) - {*(PART_ORDER if kind == "parts" else FILTER_ORDER)}):
        words = f'the {kind[:-1]} "{name}"'
        if name in states:
            raise UserError(f"The run in {run.out} began with {words}: register it again, or start a new run.")
        raise UserError(f"The run in {run.out} began without {words}: leave it out, or start a new run.")
    for part in objects:
        if state := states.get(part.name):
            part.restore(state)
