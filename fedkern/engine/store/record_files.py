"""Records of a run (metrics.jsonl, summary.json, evaluation.csv), and facts about its data for pages (facts.json)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedkern.data.types import AnySplit, FederatedData
from fedkern.engine.store import checkpoints
from fedkern.errors import UserError
from fedkern.files import atomic, filesystem
from fedkern.files.filesystem import read_json, report_damage
from fedkern.messages.states import State
from fedkern.tasks.figure_names import OVER_CLIENTS
from fedkern.tasks.partition_statistics import PartitionStatistics

EVALUATION = "evaluation.csv"
COLUMNS = ("client", "test_set", "metric", "value")
ONLY, OWN = "test", "own"
"""Names in the column ``test_set``: a run's only test set, and a client's own test set."""
_LEFT_OUT = ("validation_", *OVER_CLIENTS)

Row = tuple[str, str, str, float | None]


def rows(
    metrics: Mapping[str, float],
    prefixes: Sequence[str],
    by_client: Mapping[int, Mapping[str, float | None]],
    names: Sequence[str] | None = None,
    test_set: str = OWN,
) -> Iterator[Row]:
    """Yield the rows of the file: first the test sets of the run, then every client's own.

    Args:
        metrics: figures by name, with the prefix of their test set; figures over clients are left out.
        prefixes: prefixes of the test sets (``""``, ``"id_"``); ``validation_`` is left out.
        by_client: public figures by client, None if undefined.
        test_set: `OWN`, or `ONLY` if ``by_client`` is of every client's part of the run's test set.
    """
    by_length = sorted({*prefixes, "", *_LEFT_OUT}, key=len, reverse=True)
    for name, value in metrics.items():
        if (prefix := next(prefix for prefix in by_length if name.startswith(prefix))) not in _LEFT_OUT:
            yield "", prefix.removesuffix("_") or ONLY, name.removeprefix(prefix), value
    for k, own_figures in by_client.items():
        client = str(k) if names is None else names[k]
        yield from ((client, test_set, name, value) for name, value in own_figures.items())


def write_evaluation(out: Path, table: Iterator[Row]) -> None:
    """Write evaluation.csv atomically: a header, then one row per figure, in full precision, empty if undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(
        (client, test_set, name, "" if value is None else repr(float(value))) for client, test_set, name, value in table
    )
    atomic.write_bytes(out / EVALUATION, text.getvalue().encode())


FILE = "facts.json"


@dataclass(frozen=True)
class DataFacts:
    """Facts about a run's data.

    Private records have only those that the network and its figures disclose.

    Attributes:
        form: form of a sample, as in model.safetensors.
        pictures: names of the pictures of test samples (`fedkern.tasks.Task.pictures`).
        tests: a table by test set: ``samples``, ``groups`` (cases or patients, None if samples are independent) and of
            images ``chance``, the main figure that needs no learning or None; empty tables with private records.
        validation: number of validation samples; None with private records.
        statistics: samples of every client, by class; None with private records.
    """

    classes: tuple[str, ...] = ()
    form: Mapping[str, Any] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    tests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    validation: int | None = None
    statistics: PartitionStatistics | None = None

    @classmethod
    def of(cls, data: FederatedData, *, private: bool) -> DataFacts:
        """Return the facts about data, for ``private`` records only the public ones."""
        pictures = data.task.pictures if data.form.offers and data.form.is_scaled else ()
        if private:
            return cls(data.classes, data.form.about(), pictures, {name: {} for name in data.tests})
        tests = {name: _facts_of_set(data, split) for name, split in data.tests.items()}
        return cls(data.classes, data.form.about(), pictures, tests, len(data.validation), data.statistics)

    @property
    def chance(self) -> dict[str, float | None]:
        return {name: table["chance"] for name, table in self.tests.items() if "chance" in table}

    def write(self, out: Path) -> None:
        text = json.dumps(asdict(self), default=np.ndarray.tolist, ensure_ascii=False)
        atomic.write_bytes(out / FILE, (text + "\n").encode())

    @classmethod
    def read(cls, out: Path) -> DataFacts:
        way = f"--resume {shlex.quote(str(out))} writes it again"
        with report_damage(f"{out / FILE} is missing or damaged", way):
            table = read_json(out / FILE)
            statistics = None if table["statistics"] is None else PartitionStatistics.of_table(table["statistics"])
            names = {name: tuple(table[name]) for name in ("classes", "pictures")}
            return cls(**{**table, **names, "statistics": statistics})


def _facts_of_set(data: FederatedData, split: AnySplit) -> dict[str, object]:
    units = split.units()
    chance = {"chance": data.task.chance(split, len(data.classes))} if data.form.offers else {}
    return {"samples": len(split), "groups": None if units is None else len(np.unique(units)), **chance}


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
        # Absolute for a writer in the background: users' code may change the working folder meanwhile.
        self.path = out.absolute() / METRICS
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
        with filesystem.report_unreadable(self.path):
            self._sum = hashlib.sha256(self.path.read_bytes()[:size] if size else b"")
        if self.digest != digest:
            way = filesystem.explain_line_ends(self.path, lambda data: hashlib.sha256(data).hexdigest(), digest, size)
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
    if (entry := checkpoints.read_newest(out)) is not None:
        size = Metrics(out).check_entry(entry)
        if entry["info"]["finished"] and path.stat().st_size != size:
            raise UserError(f"{path} has lines that the run did not write: put the file back.")
    with filesystem.report_unreadable(path):
        lines = filesystem.read_text(path).splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(filesystem.parse_json(line))
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
    if filesystem.describe_file_kind(path) == "missing":
        return None
    with filesystem.report_damage(f"{path} is damaged", checkpoints.advise_rewriting(out)):
        summary = filesystem.read_json(path)
        if not isinstance(summary, dict):
            raise ValueError("it is no JSON object")
    return summary
