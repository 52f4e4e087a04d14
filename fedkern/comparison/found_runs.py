"""Finished runs of a comparison: reading their folders, grouping them, and naming the settings that differ."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from fedkern.comparison.cells import spell_value
from fedkern.comparison.seed_statistics import Difference, compare_pairs
from fedkern.engine.store.checkpoints import read_newest
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.engine.store.resuming import load_unedited, with_identity
from fedkern.errors import UserError, first_of
from fedkern.files.filesystem import expand
from fedkern.foreign_runs import recorded_run
from fedkern.foreign_runs.recorded_run import RECORD
from fedkern.listeners.events import Record, Summary
from fedkern.methods.method_registry import short_name
from fedkern.report.tables import sort_metrics
from fedkern.settings.config import NAME as SETTINGS
from fedkern.settings.config import RESUMABLE, RunConfig, flatten_table
from fedkern.settings.provenance import code_identity, describe_difference, other_data
from fedkern.settings.section import FINGERPRINTS
from fedkern.tasks.figure_names import OVER_CLIENTS, direction, split_metric

_NO_GROUP = {"seed", "method", "plugins", "device", "threads", "client_threads", "checkpoint_every"}
_NO_GROUP |= {*RESUMABLE, *FINGERPRINTS}
"""Settings that part no groups: the seed, and what decides where and how fast a run computes.

What was found in code and files parts groups by its hash."""
_CODE = "code."
"""Prefix of the names of code hashes among the settings."""
SHOWN = 8


@dataclass(frozen=True)
class FoundRun:
    """Finished run of fedkern (`OwnRun`) or of any program (`read_recorded`).

    Attributes:
        method: name of the method, of a recorded run with its framework.
        data: name of the data set, "" if unknown.
        better: ``"max"`` or ``"min"``: the better values of the ``main`` figure.
        settings: settings that separate groups: plain values by name, method options as ``options.NAME``.
        test_labels: hash of the labels in order by test set, empty if unknown.
        own_networks: whether clients are judged by their own networks.
    """

    folder: Path
    method: str
    data: str
    seed: int
    main: str
    better: str
    settings: Mapping[str, object]
    summary: Summary
    records: Sequence[Record] = field(repr=False)
    test_labels: Mapping[str, str]
    own_networks: bool = False

    @property
    def metrics(self) -> dict[str, float]:
        """The final figures that are numbers. A privately recorded run has only those that it disclosed."""
        metrics = self.summary["metrics"]
        return {name: metrics[name] for name in sort_metrics(metrics, main=self.main)}

    def direction(self, figure: str) -> str | None:
        """Return whether high or low values of a figure are better, ``"max"`` or ``"min"``, None if unknown."""
        named, main = self.summary.get("better", {}), {self.main: self.better}
        return named[figure] if figure in named else direction(figure, main, self.summary.get("per_class", ()))

    @classmethod
    def read_recorded(cls, folder: Path) -> FoundRun:
        """Return a run that `fedkern.record` wrote, or raise UserError."""
        header, records = recorded_run.read_header(folder), recorded_run.read_records(folder)
        if (summary := recorded_run.read_summary(folder, records)) is None:
            raise UserError(f"The run in {folder} is not finished: continue it with resume=ROUND, or leave it out.")
        settings = {name: value for name, value in {**header.sizes, **header.settings}.items() if name not in _NO_GROUP}
        return cls(
            folder, f"{header.method} ({header.framework})", str(settings.get("data", "")), header.seed, header.main,
            header.better, settings, summary, records, header.test_labels,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OwnRun(FoundRun):
    """Finished run of fedkern."""

    config: RunConfig

    @classmethod
    def of(cls, folder: Path, config: RunConfig, summary: Summary, records: Sequence[Record]) -> OwnRun:
        settings = flatten_table({name: value for name, value in config.to_dict().items() if name not in _NO_GROUP})
        code = code_identity(config)
        plugins = sorted(value for name, value in code.items() if name.startswith("plugins."))  # a file may move
        settings |= {f"{_CODE}{name}": text[:12] for name, text in code.items() if not name.startswith("plugins.")}
        if plugins:
            settings[f"{_CODE}plugins"] = hashlib.sha256(repr(plugins).encode()).hexdigest()[:12]
        return cls(
            folder, config.method, config.data, config.seed, config.main, config.better, settings, summary, records,
            summary.get("test_labels", {}), config.own_networks, config=config,
        )  # fmt: skip


def has_other_labels(run: FoundRun, peer: FoundRun) -> bool | None:
    """Return whether two runs were judged on other test labels, None if that is unknown.

    Between runs of fedkern `check_provenance` decides.
    """
    if isinstance(run, OwnRun) and isinstance(peer, OwnRun):
        return False
    sets = run.test_labels.keys() & peer.test_labels.keys()
    return any(run.test_labels[name] != peer.test_labels[name] for name in sets) if sets else None


@dataclass
class Group:
    """Runs of one method with the same settings, by seed and in seed order, and a label for people."""

    label: str
    method: str
    runs: dict[int, FoundRun] = field(default_factory=dict)

    def values(self, figure: str) -> dict[int, float]:
        """Return a final figure by seed, of the runs that have the figure."""
        return {seed: run.metrics[figure] for seed, run in self.runs.items() if figure in run.metrics}

    def shared_seeds(self, base: Group) -> dict[int, bool | None]:
        """Return the seeds of both groups, each with the answer of `has_other_labels`."""
        return {seed: has_other_labels(self.runs[seed], base.runs[seed]) for seed in self.runs if seed in base.runs}

    def compare_to(self, base: Group, figure: str) -> Difference | None:
        """Return the differences of a figure over the shared seeds that were judged on the same test labels."""
        other_seeds = {seed for seed, is_other in self.shared_seeds(base).items() if is_other}
        values = {seed: value for seed, value in self.values(figure).items() if seed not in other_seeds}
        return compare_pairs(values, base.values(figure))


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SETTINGS, RECORD))


def runs_inside(folder: Path) -> list[Path]:
    return sorted(file.parent for name in (SETTINGS, RECORD) for file in folder.glob(f"*/{name}"))


def read_run(folder: Path) -> FoundRun:
    return FoundRun.read_recorded(folder) if (folder / RECORD).exists() else read_own_run(folder)


def read_own_run(folder: str | Path, trusted: Collection[str] = ()) -> OwnRun:
    path = Path(folder)
    config = load_unedited(path, trusted=trusted, device="cpu")
    if (summary := read_summary(path)) is None:
        raise UserError(f"The run in {path} is not finished: continue it with --resume {path}, or leave it out.")
    return OwnRun.of(path, with_identity(config, read_newest(path)), summary, read_metrics(path))


def read_runs(folders: Iterable[str | Path]) -> tuple[list[FoundRun], list[str]]:
    """Read run folders, and all finished runs in folders of runs. Also return the unfinished ones."""
    runs: dict[Path, FoundRun] = {}
    unfinished: list[str] = []
    for given_folder in folders:
        path = expand(given_folder)
        inside = [] if is_run(path) else runs_inside(path)
        finished = [folder for folder in inside if (folder / "summary.json").exists()]
        if inside and not finished:
            raise UserError(f"No run in {path} is finished.")
        unfinished += [str(folder) for folder in inside if folder not in finished]
        for folder in finished or [path]:
            key = folder.resolve()
            if key in runs:
                raise UserError(f"{folder} is given twice: name every run once.")
            runs[key] = read_run(folder)
    return list(runs.values()), unfinished


def group_runs(runs: Iterable[FoundRun], label: Callable[[FoundRun], str] | None = None) -> list[Group]:
    """Group runs by method and by all settings but the seed, in the order of each group's first run.

    ``label`` names a run's group (None: by the method, and the settings in which its groups differ). Raises UserError
    for a repeated seed, for different data under one name and, with ``label``, for different code or files.
    """
    runs = list(runs)
    check_provenance(runs, code=label is not None)
    tables: list[tuple[str, Mapping[str, Any]]] = []
    groups: list[Group] = []
    for run in runs:
        key = (run.method, run.settings)
        if key not in tables:
            tables.append(key)
            groups.append(Group(label(run) if label else short_name(run.method), run.method))
        group = groups[tables.index(key)]
        if run.seed in group.runs:
            raise UserError(
                f"{group.runs[run.seed].folder} and {run.folder} are runs of the same method, settings and seed: leave "
                "one out."
            )
        group.runs[run.seed] = run
    for group in groups:
        group.runs = dict(sorted(group.runs.items()))
    if label is None:
        for group, (method, table) in zip(groups, tables, strict=True):
            siblings = [sibling for name, sibling in tables if name == method]
            differing = [name for name in _names(siblings) if len({str(sibling.get(name)) for sibling in siblings}) > 1]
            words = [f"{name.removeprefix('options.')}={spell_value(table.get(name, 'unset'))}" for name in differing]
            group.label = " ".join([short_name(method), *words])
    return groups


def check_provenance(runs: Sequence[FoundRun], *, code: bool) -> None:
    """Raise UserError if fedkern's runs under one data name have different data or, with ``code``, different code."""
    alike: dict[str, OwnRun] = {}  # a run for all that rest on the same
    for run in runs:
        if isinstance(run, OwnRun):
            alike.setdefault(repr((run.config.identity, code_identity(run.config), run.settings)), run)
    for own_run, other_run in combinations(alike.values(), 2):
        configs = own_run.config, other_run.config
        if (code or other_data(*configs)) and (reason := describe_difference(*configs)):
            raise UserError(
                f"{own_run.folder} and {other_run.folder} were made with {reason}, and are no runs of one comparison: "
                "compare runs of the same data and code."
            )


def _names(tables: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for table in tables for name in table))


def differing_settings(groups: Sequence[Group]) -> str:
    """Return a sentence on the settings besides the method in which the groups differ, or "".

    A method option that only one method has is no difference.
    """
    if len(groups) < 2:
        return ""
    first_runs = {group.label: next(iter(group.runs.values())) for group in groups}
    is_mixed, parts = not all(isinstance(run, OwnRun) for run in first_runs.values()), []
    tables = {label: run.settings for label, run in first_runs.items()}
    for name in _names(tables.values()):
        of_some = is_mixed or name.startswith(("options.", _CODE))
        by_value: dict[str, list[str]] = {}
        for label, table in tables.items():
            if name in table or not of_some:
                by_value.setdefault(spell_value(table.get(name, "unset")), []).append(label)
        if len(by_value) > 1:
            values = "; ".join(f"{value} for {', '.join(labels)}" for value, labels in by_value.items())
            parts.append(f"{name.removeprefix('options.')} ({values})")
    if is_mixed:
        differing = f"differ in {first_of(parts, SHOWN)}" if parts else "do not differ"
        return f"Settings are compared where several groups name them: they {differing}."
    if not parts:
        return "Besides the method and its own options, the groups have the same settings."
    return f"Besides the method, the groups differ in {first_of(parts, SHOWN)}."


def main_figures(groups: Sequence[Group]) -> list[str]:
    """Return the names of each run's main figure on its test sets, not on validation sets, which are no results.

    If clients have their own networks, the mean and the worst client on its own test set follow.
    """
    runs, sets = [run for group in groups for run in group.runs.values()], own_sets(groups)
    main_names = {name: 0 for run in runs for name in run.metrics if name.endswith(run.main)}
    names = sort_metrics({name: 0 for name in main_names if split_metric(name, sets)[0] != "validation"}, sets)
    mains = {run.main for run in runs}
    has_own_networks = any(run.own_networks for run in runs)
    clients = {prefix + main for prefix in OVER_CLIENTS for main in mains} if has_own_networks else set()
    return [name for name in names if split_metric(name, sets)[1] in mains or name in clients] or names


def own_sets(groups: Iterable[Group]) -> set[str]:
    return {name for group in groups for run in group.runs.values() for name in run.summary.get("per_class", ())}
