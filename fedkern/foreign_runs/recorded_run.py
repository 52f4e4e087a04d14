"""Format of a recorded run's folder: ``record.toml``, ``metrics.jsonl`` and, of a finished run, ``summary.json``."""

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkern.errors import WORD, format_value, require_format
from fedkern.files.filesystem import describe_file_kind, parse_json, read_json, read_text, report_damage

RECORD, METRICS, SUMMARY = "record.toml", "metrics.jsonl", "summary.json"
FORMAT, LARGEST = 1, 1e300
COSTS = ("seconds", "bytes_up", "bytes_down")
"""Costs of the rounds so far, beside a record's round and its figures. An unknown cost is None or missing."""
TAKEN = frozenset(("round", "clock", "bytes", "group", "method", "seed", "seeds", "folder", "reached", *COSTS))
"""Names that no figure may have: entries of records and columns of comparisons."""
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
        _require(_is_text(self.method), "method", "a text of one line", self.method)
        _require(_is_text(self.framework), "framework", "a text of one line", self.framework)
        _require(_is_count(self.seed), "seed", "a whole number from 0 on", self.seed)
        check_figure(self.main, None)
        _require(self.better in ("max", "min"), f"better, for {self.main},", '"max" or "min"', self.better)
        _require_table("settings", self.settings, _is_setting, "a text of one line, a number, a boolean or a list")
        _require_table("sizes", self.sizes, _is_count, "a whole number from 0 on")
        _require_table("test_labels", self.test_labels, _HASH.fullmatch, "the result of fedkern.hash_labels")


def _require_table(name: str, table: Mapping[str, Any], is_right: Callable[..., object], kind: str) -> None:
    _require(isinstance(table, Mapping) and all(map(_is_text, table)), name, "a table by name", table)
    for key, value in table.items():
        _require(is_right(value), f"{name}: {key}", kind, value)


def _require(is_right: object, name: object, kind: str, value: object) -> None:
    if not is_right:
        raise ValueError(f"{name} must be {kind}, not {format_value(value)}")


def _is_text(value: object, shortest: int = 1) -> bool:
    return isinstance(value, str) and value.isprintable() and shortest <= len(value) <= WORD


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_number(value: object, low: float = -LARGEST, high: float = LARGEST) -> bool:
    return type(value) in (int, float) and low <= value <= high  # type: ignore[operator]


def _is_setting(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(entry is not None and _is_setting(entry) for entry in value)
    return value is None or isinstance(value, bool) or _is_number(value) or _is_text(value, 0)


def check_figure(name: object, value: object) -> None:
    """Raise ValueError unless a record may hold the figure. None stands for NaN."""
    if not isinstance(name, str) or not _FIGURE.fullmatch(name) or name in TAKEN:
        raise ValueError(f"no figure can have the name {format_value(name)}")
    is_share = name.endswith("accuracy")
    low, high, kind = (0.0, 1.0, "a fraction from 0 to 1") if is_share else (-LARGEST, LARGEST, "a number")
    _require(value is None or _is_number(value, low, high), name, kind, value)


def read_header(folder: Path) -> Header:
    """Return the contents of ``record.toml``, or raise UserError."""
    path = folder / RECORD
    with report_damage(f"{path} is missing or damaged", "record the run again"):
        table = tomllib.loads(read_text(path))
        require_format(path, table.pop("format", None), FORMAT)
        return Header(**table)


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
    sent = {name: last[f"bytes_{name}"] for name in ("up", "down") if f"bytes_{name}" in last}
    total = sum(sent.values()) if sent and None not in sent.values() else None
    return {"metrics": figures, "rounds": last["round"], "bytes": {**sent, "total": total}, "seconds": last["seconds"]}


def read_summary(folder: Path, records: Sequence[Table]) -> Table | None:
    """Return the summary of a finished run, None of an unfinished one, or raise UserError."""
    path = folder / SUMMARY
    if describe_file_kind(path) == "missing":
        return None
    with report_damage(f"{path} is damaged", "record the run again"):
        if not records or read_json(path) != summarise(records):
            raise ValueError(f"it is not what the rounds in {METRICS} give")
    return summarise(records)


def dump(value: object) -> bytes:
    return (json.dumps(value, allow_nan=False, ensure_ascii=False) + "\n").encode()
