"""Order of a run's parts, and of the filters that uploads pass: names, as each registers itself in its own file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fedkern.engine import parts, uploads
from fedkern.engine.parts.base import Part
from fedkern.engine.registry import FILTERS, PARTS
from fedkern.engine.run_objects import RunObjects
from fedkern.engine.uploads.filters import Filter

PART_ORDER = (
    "traffic", "artifacts", "evaluation", "server", "oracle", "privacy", "stop_at", "patience", "max_seconds",
    "max_bytes", "diagnoses", "answers", "records", "warnings", "listeners", "results", "trace", "checkpoints",
)  # fmt: skip
FILTER_ORDER = (
    "client_digests", "bytes", "reduction", "declared", "norm_bounds", "private_mean", "server_digests",
)  # fmt: skip

for package in (parts, uploads):
    for module in iter_modules(package.__path__, f"{package.__name__}."):
        import_module(module.name)


def parts_of(run: RunObjects) -> list[Part]:
    """The parts of a run, in order."""
    return _built(PARTS, PART_ORDER, run)


def filters_of(run: RunObjects) -> list[Filter]:
    """What uploads pass on their way to the server of a run, in order; the run has its executor."""
    found: list[Filter] = _built(FILTERS, FILTER_ORDER, run)
    whole = any(each.whole for each in found)
    return [each for each in found if not (whole and each.stays)]


def _built(table: Mapping[str, Any], order: Sequence[str], run: RunObjects) -> list[Any]:
    return [made for name in order if (made := table[name].build(run)) is not None]
