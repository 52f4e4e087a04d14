"""Order of a run's parts and upload filters, by registered names."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fedkern.engine import parts, uploads
from fedkern.engine.parts.part import PARTS, Part
from fedkern.engine.parts.part import register_part as register_part
from fedkern.engine.setup import user_parts
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.uploads.filters import FILTERS, Filter
from fedkern.engine.uploads.filters import register_filter as register_filter
from fedkern.errors import UserError
from fedkern.messages.states import State
from fedkern.usercode import plugins
from fedkern.usercode.registry import Registry

USERS = "..."
"""Place of user-defined parts or filters."""
PART_ORDER = (
    "effects", "traffic", "artifacts", "evaluation", "server", "oracle", "privacy", USERS, "stop_at", "patience",
    "max_seconds", "max_bytes", "diagnoses", "answers", "records", "warnings", "listeners", "results", "trace",
    "checkpoints",
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
    objects = (user_parts.build(table[name], run) if name in user_names else table[name].build(run) for name in names)
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
