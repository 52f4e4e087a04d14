"""Facts about a run's data (facts.json) for the run's pages, which do not read the data."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedkern.data.types import AnySplit, FederatedData
from fedkern.files import atomic
from fedkern.files.inputs import read_json, report_damage
from fedkern.tasks.partition_statistics import PartitionStatistics

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
