"""A run folder for pictures and pages: settings, records, summary, facts about the data."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedkern.engine.figures.final_figures import set_name
from fedkern.engine.store import confusions
from fedkern.engine.store.artifacts import Artifact
from fedkern.engine.store.artifacts import read as read_artifacts
from fedkern.engine.store.checkpoints import read_newest
from fedkern.engine.store.confusions import Confusions
from fedkern.engine.store.record_files import METRICS, DataFacts, read_metrics, read_summary
from fedkern.engine.store.resuming import load_unedited
from fedkern.listeners.events import Record, Summary
from fedkern.report.tables import sort_metrics
from fedkern.settings.config import RunConfig
from fedkern.tasks import TASKS
from fedkern.tasks.figure_names import split_metric


@dataclass(frozen=True)
class Contents:
    """Contents of a run folder.

    Attributes:
        summary: contents of ``summary.json``, or of the rounds so far.
        facts: facts about the run's data.
        artifacts: tensors that the method logged.
        built: versions that the run was made with.
    """

    folder: Path
    config: RunConfig
    records: Sequence[Record]
    summary: Summary
    facts: DataFacts = field(repr=False)
    finished: bool = True
    confusion: Confusions | None = None
    warnings: Mapping[str, str] = field(default_factory=dict)
    artifacts: Sequence[Artifact] = ()
    built: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.config.method} on {self.config.data}"

    @property
    def private(self) -> bool:
        """Return whether single clients and counts of samples must not be shown."""
        return self.config.records == "private"

    @property
    def metrics(self) -> dict[str, float]:
        """The finite final figures, or those of the last evaluated round of an unfinished run."""
        metrics = self.summary["metrics"]
        names = sort_metrics(metrics, main=self.config.main)
        return {name: metrics[name] for name in names if math.isfinite(metrics[name])}

    @property
    def main(self) -> list[str]:
        main = self.config.main  # with any prefix: ``ood_accuracy``, ``vote_accuracy``
        names = [name for name in self.metrics if name.endswith(main) and self.split(name)[0] != "validation"]
        return [name for name in names if self.split(name)[1] == main] or names[:1]

    def chance(self, records: Iterable[Record]) -> dict[str, float]:
        return constant_figures(records, self.config.main, self.facts.chance, self.confusion, len(self.facts.classes))

    def split(self, name: str) -> tuple[str, str]:
        """Return test set and figure of a name such as ``ood_accuracy``, also for user-defined test sets."""
        return split_metric(name, self.facts.tests)

    def client(self, k: str) -> str:
        names = None if self.facts.statistics is None else self.facts.statistics.names
        return names[int(k)] if names is not None and int(k) < len(names) else f"client {k}"


def read_run_folder(run_dir: Path, *, trusted: Collection[str] = ()) -> Contents:
    """Read a run folder. ``trusted`` is code that may be imported (see :func:`fedkern.load`).

    Raises:
        UserError: there is no run, a file is damaged, or the settings were changed after the run began.
    """
    config = load_unedited(run_dir, trusted=trusted, device="cpu")
    entry = read_newest(run_dir)
    info = {} if entry is None else entry["info"]
    summary = read_summary(run_dir) if info.get("finished", True) else None  # an older one, of a run since extended
    records = read_metrics(run_dir) if entry or (run_dir / METRICS).exists() else []
    return Contents(
        run_dir, config, records, summary or _so_far(records, config.main), DataFacts.read(run_dir),
        summary is not None,
        confusion=None if config.records == "private" else confusions.read(run_dir),
        warnings=info.get("parts", {}).get("warnings", {}) if summary is None else summary.get("diagnostics", {}),
        artifacts=read_artifacts(run_dir), built=(summary or info).get("versions") or {},
    )  # fmt: skip


def _so_far(records: Sequence[Record], main: str) -> Summary:
    """Return the summary of an unfinished run, with the figures of its last evaluated round."""
    evaluated = (record for record in reversed(records) if any(name.endswith(main) for name in record))
    last = records[-1] if records else {}
    sent = {"total": last["bytes_up"] + last["bytes_down"]} if "bytes_up" in last else {}
    phases = sum_phases(*(record.get("phases", {}) for record in records))
    seconds = {"seconds": last["seconds"]} if "seconds" in last else {}
    return {"metrics": next(evaluated, {}), "rounds": last.get("round", 0), "bytes": sent, "phases": phases, **seconds}


def sum_phases(*tables: Mapping[str, float]) -> dict[str, float]:
    """Return seconds by phase over all tables, with the numbered parts of a phase (``train/images 3``) as one."""
    seconds: dict[str, float] = {}
    for name, value in (item for table in tables for item in table.items()):
        plain = re.sub(r" \d+$", "", name)
        seconds[plain] = seconds.get(plain, 0.0) + float(value)
    return seconds


def constant_figures(
    records: Iterable[Record], main: str, known: Mapping[str, float | None], confusion: Confusions | None, classes: int
) -> dict[str, float]:
    """Return the main figures of a constant prediction, such as one class everywhere, as far as known.

    ``known`` are constants by test set, of data whose counts may be shown. In retrieval the records have the number of
    candidates.
    """
    metrics = {name: value for record in records for name, value in record.items()}
    tasks = [task for task in TASKS.values() if task.main == main]
    figures: dict[str, float] = {}
    for name, (test_set, figure) in ((name, split_metric(name, known)) for name in metrics if tasks):
        if figure != main:
            continue
        matrix = confusion.matrices.get(set_name(test_set)) if confusion is not None else None
        counts = None if matrix is None else matrix.sum(1)
        gallery = metrics.get(f"{test_set}_gallery" if test_set else "gallery", 0.0)
        value = tasks[0].chance(None, classes, counts=counts, candidates=gallery)
        value = known.get(test_set) if value is None else value
        if value is not None:
            figures[name] = value
    return figures
