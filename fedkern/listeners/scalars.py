"""The figures of a round's record as scalars for trackers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedkern.errors import printable_name

TAG = 200
"""Longest tag, in characters."""
_NOT_FIGURES = {"round", "rounds", "name", "evaluated", "clients", "dropped", "phases"}
_BOOKKEEPING = {"clock", "seconds", "round_seconds", "bytes_up", "bytes_down", "round_bytes_up", "round_bytes_down"}
_NOT_OF_CLIENTS = {"samples", "seconds"}


def scalars(record: Mapping[str, Any], sets: Collection[str] = ()) -> dict[str, float]:
    """Return the figures of a round's record by tag. ``sets`` are the names of the run's test sets.

    Metrics and losses keep their names, with the test set before a slash. Times and bytes are under ``run/``, means
    over the clients of the round under ``clients/``.
    """
    from fedkern.tasks.figure_names import split_metric

    result: dict[str, float] = {}
    for name, value in record.items():
        if name in _NOT_FIGURES or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        test_set, figure = split_metric(name, sets)
        tag = f"run/{name}" if name in _BOOKKEEPING else f"{test_set}/{figure}" if test_set else name
        result[printable_name(tag, TAG)] = float(value)
    for name, mean in _means(list(record.get("clients", {}).values())).items():
        result[printable_name(f"clients/{name}", TAG)] = mean
    return result


def _means(clients: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for info in clients:
        for name, value in info.items():
            if name not in _NOT_OF_CLIENTS and isinstance(value, (int, float)) and not isinstance(value, bool):
                values.setdefault(name, []).append(float(value))
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
