"""Records of a run: metrics.jsonl and summary.json."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkern.engine.store import checkpoints
from fedkern.errors import UserError
from fedkern.files import atomic, inputs
from fedkern.messages.states import State

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


def plain(value: object) -> Any:
    """Return ``value`` as JSON: NaN and infinities become None, tuples become lists, keys become strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


class Metrics:
    """File metrics.jsonl, with one JSON object per round, evaluated or not, durable after :meth:`sync`."""

    def __init__(self, out: Path) -> None:
        self.path = out / METRICS
        self.size = 0
        self._sum = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._sum.hexdigest()

    def check(self, size: int, digest: str) -> None:
        """Compare the first ``size`` bytes of the file with their SHA-256 in a checkpoint."""
        present = self.path.stat().st_size if self.path.exists() else 0
        if present < size:
            raise UserError(
                f"{self.path} has lost rounds that the checkpoint has ({present:,} of {size:,} bytes are there): put "
                "the file back, or start the run again with another --out."
            )
        with inputs.report_unreadable(self.path):
            self._sum = hashlib.sha256(self.path.read_bytes()[:size] if size else b"")
        if self.digest != digest:
            way = inputs.explain_line_ends(self.path, lambda content: hashlib.sha256(content).hexdigest(), digest, size)
            way = way or ": put the file back, or start the run again with another --out"
            raise UserError(f"{self.path} is not what the run wrote{way}.")

    def check_entry(self, entry: checkpoints.Entry) -> int:
        state = entry["info"]["parts"]["records"]
        self.check(state["bytes"], state["sha256"])
        return int(state["bytes"])

    def truncate(self, size: int, digest: str | None = None) -> None:
        """Drop lines after a checkpoint at which the file had ``size`` bytes."""
        if digest is not None:
            self.check(size, digest)
        with atomic.open_in_place(self.path, "ab") as file:
            file.truncate(size)
        self.size = size

    def append(self, record: Mapping[str, object]) -> None:
        line = (json.dumps(plain(record), allow_nan=False) + "\n").encode()
        with atomic.open_in_place(self.path, "ab") as file:
            file.write(line)
        self.size += len(line)
        self._sum.update(line)

    def sync(self) -> None:
        atomic.flush(self.path)


def read_metrics(out: Path | str) -> list[State]:
    """Return the records of a run folder, one per round, with metrics if the round was evaluated.

    A last line cut off by a crash is left out.
    """
    out = Path(out)
    path = out / METRICS
    entry = checkpoints.read_newest(out)
    if entry is not None:
        size = Metrics(out).check_entry(entry)
        if entry["info"]["finished"] and path.stat().st_size != size:
            raise UserError(f"{path} has lines that the run did not write: put the file back.")
    with inputs.report_unreadable(path):
        lines = inputs.read_text(path).splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(inputs.parse_json(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}, line {number}, is damaged: expected one JSON object per line.") from None
    return records


def write_summary(out: Path, summary: Mapping[str, object]) -> None:
    text = json.dumps(plain(summary), indent=2, allow_nan=False, ensure_ascii=False)
    atomic.write_bytes(out / SUMMARY, (text + "\n").encode())


def read_summary(out: Path | str) -> State | None:
    """Return the summary.json of a finished run, or None."""
    out = Path(out)
    path = out / SUMMARY
    checkpoints.check_results(out, SUMMARY)
    if inputs.describe_file_kind(path) == "missing":
        return None
    with inputs.report_damage(f"{path} is damaged", checkpoints.advise_rewriting(out)):
        summary = inputs.read_json(path)
        if not isinstance(summary, dict):
            raise ValueError("it is no JSON object")
    return summary
