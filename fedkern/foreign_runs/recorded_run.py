"""Format of a recorded run's folder: ``record.toml``, ``metrics.jsonl`` and, of a finished run, ``summary.json``."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedkern.errors import WORD, format_value, require_format
from fedkern.files.inputs import describe_file_kind, parse_json, read_json, read_text, report_damage

RECORD, METRICS, SUMMARY = "record.toml", "metrics.jsonl", "summary.json"
FORMAT = 1
COSTS = ("seconds", "bytes_up", "bytes_down")
"""Costs of the rounds so far, beside a record's round and its figures. An unknown cost is None or missing."""
TAKEN = frozenset({
    "round", "rounds", "name", "evaluated", "clients", "client_metrics", "phases", "clock", "bytes", "group", "method",
    "seed", "seeds", "folder", "reached", *COSTS,
})  # fmt: skip
"""Names that no figure may have: entries of records and columns of comparisons."""
LARGEST = 1e300
_FIGURE = re.compile(r"[A-Za-z_][\w.]{0,99}", re.ASCII)
_HASH = re.compile("[0-9a-f]{64}")
Table = dict[str, Any]


@dataclass(frozen=True)
class Header:
    """Facts about a recorded run, the contents of ``record.toml``. Raises ValueError for values of another kind.

    Attributes:
        better: ``"max"`` or ``"min"``: the better values of the ``main`` figure.
        settings: texts, numbers, booleans and lists of them by name.
        sizes: whole numbers by name, such as ``clients``.
        test_labels: result of :func:`fedkern.hash_labels` by test set; a single set is called ``test``.
    """

    method: str
    seed: int
    framework: str
    main: str
    better: str
    settings: Mapping[str, Any]
    sizes: Mapping[str, int]
    test_labels: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in ("method", "framework"):
            _require(_is_text(getattr(self, name)), name, "a text of one line", getattr(self, name))
        _require(_is_count(self.seed), "seed", "a whole number from 0 on", self.seed)
        check_figure(self.main, None)
        _require(self.better in ("max", "min"), "better", '"max" or "min"', self.better)
        kinds: dict[str, tuple[Callable[[object], object], str]] = {
            "settings": (_is_setting, "a text of one line, a number, a boolean or a list of them"),
            "sizes": (_is_count, "a whole number from 0 on"),
            "test_labels": (lambda value: _HASH.fullmatch(str(value)), "the result of fedkern.hash_labels"),
        }
        for part, (is_right, kind) in kinds.items():
            table = getattr(self, part)
            _require(isinstance(table, Mapping) and all(map(_is_text, table)), part, "a table by name", table)
            for name, value in table.items():
                _require(is_right(value), f"{part}: {name}", kind, value)


def _require(is_right: object, name: object, kind: str, value: object) -> None:
    if not is_right:
        raise ValueError(f"{name} must be {kind}, not {format_value(value)}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= WORD


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_number(value: object, low: float = -LARGEST) -> bool:
    return type(value) in (int, float) and low <= value < LARGEST  # type: ignore[operator]


def _is_setting(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_setting, value))
    return value == "" or isinstance(value, bool) or _is_number(value) or _is_text(value)


def check_figure(name: object, value: object) -> None:
    """Raise ValueError unless a record may hold the figure. None stands for NaN."""
    if not isinstance(name, str) or not _FIGURE.fullmatch(name) or name in TAKEN:
        raise ValueError(f"no figure can have the name {format_value(name)}")
    _require(value is None or _is_number(value), name, "a number", value)
    is_fraction = not name.endswith("accuracy") or value is None or 0 <= value <= 1  # type: ignore[operator]
    _require(is_fraction, name, "a fraction from 0 to 1", value)


def read_header(folder: Path) -> Header:
    """Return the contents of ``record.toml``, or raise UserError."""
    path = folder / RECORD
    with report_damage(f"{path} is damaged", "record the run again"):
        table = tomllib.loads(read_text(path))
        require_format(path, table.pop("format", None), FORMAT)
        if unknown := table.keys() - {entry.name for entry in fields(Header)}:
            raise ValueError(f"it has an unknown entry {format_value(min(unknown))}")
        return Header(**{entry.name: table.get(entry.name, {}) for entry in fields(Header)})


def read_records(folder: Path) -> list[Table]:
    """Return the records of the rounds, in order, without a last line that a crash cut off, or raise UserError."""
    path = folder / METRICS
    records: list[Table] = []
    with report_damage(f"{path} is damaged", "record the run again"):
        text = read_text(path)
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
            try:
                check_record(record := parse_json(line), records[-1]["round"] if records else -1)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            records.append(record)
    return records


def check_record(record: Table, last_round: int) -> None:
    """Raise ValueError unless this is the record of a round after ``last_round``."""
    _require(isinstance(record, dict), "a line", "a JSON object", record)
    number: Any = record.get("round")
    _require(_is_count(number) and number > last_round, "round", f"a whole number over {last_round}", number)
    for name, value in record.items():
        if name in COSTS:
            _require(value is None or _is_number(value, 0), name, "a number from 0 on", value)
        elif name != "round":
            check_figure(name, value)


def summarise(records: Sequence[Table]) -> Table:
    """Return the summary of the rounds, at least one: each figure's last value, and the costs."""
    last = records[-1]
    figures = {name: value for record in records for name, value in record.items() if name not in TAKEN}
    sent = {name: last[f"bytes_{name}"] for name in ("up", "down") if last.get(f"bytes_{name}") is not None}
    total = {"bytes": {**sent, "total": sum(sent.values())}} if sent else {}
    return {"metrics": figures, "rounds": last["round"], **total, "seconds": last.get("seconds")}


def read_summary(folder: Path, records: Sequence[Table], main: str) -> Table | None:
    """Return the summary of a finished run, None of an unfinished one, or raise UserError."""
    path = folder / SUMMARY
    if describe_file_kind(path) == "missing":
        return None
    with report_damage(f"{path} is damaged", "record the run again"):
        if not records or main not in (summary := summarise(records))["metrics"]:
            raise ValueError(f'no round in {METRICS} has the main figure "{main}"')
        if read_json(path) != summary:
            raise ValueError(f"it is not what the rounds in {METRICS} give")
    return summary


def dump(value: object) -> bytes:
    return (json.dumps(value, allow_nan=False, ensure_ascii=False) + "\n").encode()
