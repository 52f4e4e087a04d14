"""Result of a comparison: a table over the groups, the sentences below it, and the files of both."""

import csv
import io
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from fedkern.comparison.found_runs import SHOWN, Group, OwnRun, differing_settings, main_figures, own_sets
from fedkern.comparison.seed_statistics import Target, complete_mean, interval_text, plus_minus
from fedkern.engine.store import confusions, record_files
from fedkern.errors import UserError, first_of, printable_name, suggest_name, warn_instead
from fedkern.files import atomic
from fedkern.listeners.events import Record
from fedkern.methods.method_registry import short_name
from fedkern.report.names import CELL
from fedkern.report.run_contents import constant_figures
from fedkern.report.tables import human_bytes, human_metric, human_time
from fedkern.tasks.figure_names import number_text, scale, short_set_title, short_title, split_metric
from fedkern.text_table import Table
from fedkern.usercode.named_code import INSTANCE

CSV, MARKDOWN, LATEX, PICTURE = "comparison.csv", "comparison.md", "comparison.tex", "comparison.png"
SHOWN_WARNINGS = ("no-effect", "shared-machine")
"""Warnings of runs whose sentences stand below the table."""
TAKEN = ("rounds", "bytes", "seconds")
"""Costs of reaching a target."""


@dataclass
class Result:
    """Groups of finished runs, at least one and none empty, compared with the first group.

    Rounds, bytes and seconds count up to the ``target``. ``notes`` say how the groups came about, as by chosen
    settings. ``failures`` has a sentence for every failed run.
    """

    groups: list[Group]
    target: Target | None = None
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.figures = main_figures(self.groups)
        self.runs = [run for group in self.groups for run in group.runs.values()]
        if self.target is not None:
            self.target = self.target.with_direction([run.direction(self.target.figure) for run in self.runs])

    def check_target(self) -> None:
        """Raise UserError if no round has the target's figure, or the figure cannot reach it or has no direction."""
        if self.target is None:
            return
        self.target.check(own_sets(self.groups))
        records = [record for run in self.runs for record in run.records]
        figures = {name for record in records for name, value in record.items() if isinstance(value, float)}
        figures -= {"seconds", "round_seconds", "clock", "simulated_seconds", "staleness"}
        if self.target.figure not in figures:
            hint = suggest_name(self.target.figure, figures)
            raise UserError(
                f'No round has the figure "{self.target.figure}" of --target.{hint} '
                f"The rounds have {', '.join(sorted(figures)) or 'no figures'}."
            )
        self.target.check_direction()

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row for every group, with plain numbers, None where there is no value.

        The keys are those of :attr:`fedkern.comparison.compared.Comparison.table`. ``bytes``, ``seconds`` and the costs
        of a target have a ``_std`` too. A target has costs if all runs reach it.
        """
        base = self.groups[0]
        rows = []
        for group in self.groups:
            row: dict[str, Any] = {"group": group.label, "method": short_name(group.method), "seeds": len(group.runs)}
            for figure in self.figures:
                row[figure], row[f"{figure}_std"] = complete_mean([*group.values(figure).values()])
                difference = None if group is base else group.compare_to(base, figure)
                for part, name in (("difference", "mean"), ("low", "low"), ("high", "high")):
                    row[f"{figure}_{part}"] = getattr(difference, name, None)
            summaries = [run.summary for run in group.runs.values()]
            row["bytes"], row["bytes_std"] = complete_mean([summary["bytes"]["total"] for summary in summaries])
            row["seconds"], row["seconds_std"] = complete_mean([summary["seconds"] for summary in summaries])
            if self.target is not None:
                took = [self.target.cost_of_target(run.records) or {} for run in group.runs.values()]
                row["reached"] = len([*filter(None, took)])
                for name in TAKEN:
                    key = f"{name}_to_target"
                    row[key], row[f"{key}_std"] = complete_mean([costs.get(name) for costs in took])
            rows.append(row)
        return rows

    def run_rows(self) -> list[dict[str, object]]:
        rows = []
        for group in self.groups:
            for seed, run in group.runs.items():
                row = {"group": group.label, "method": short_name(group.method), "seed": seed, **run.metrics}
                row |= {"bytes": run.summary["bytes"]["total"], "seconds": run.summary["seconds"]}
                if self.target is not None:
                    took = self.target.cost_of_target(run.records) or {}
                    row |= {f"{name}_to_target": took.get(name) for name in TAKEN}
                rows.append({**row, "folder": str(run.folder)})
        return rows

    def sentences(self) -> list[str]:
        texts = [_seeds(self.groups)]
        if self.shared_start:
            texts.append(
                "All seeds start from the same weights, those of the module: a class or function as model=NETWORK is "
                "built anew for every seed."
            )
        if len(self.groups) > 1:
            texts += [_intervals(self.groups, self.figures), *label_notes(self.groups), differing_settings(self.groups)]
        if not self.figures:
            texts.append("The runs have no main figure, as privately recorded runs may not.")
        if self.target is not None:
            texts.append(
                f"To target: up to the first evaluated round with {self.target}; bytes count both directions, seconds "
                "are those of the machine that ran."
            )
        diagnostics = [run.summary.get("diagnostics") or {} for run in self.runs]
        texts += dict.fromkeys(str(table[name]) for name in SHOWN_WARNINGS for table in diagnostics if name in table)
        if numbers := Counter(str(name) for table in diagnostics for name in table if name not in SHOWN_WARNINGS):
            counts = ", ".join(f"{name} ({count} run{'s' * (count > 1)})" for name, count in sorted(numbers.items()))
            texts.append(f"Warnings: {counts}; see diagnostics in the runs' summary.json.")
        return [*texts, *self.notes]

    def all_sentences(self) -> list[str]:
        return [*self.sentences(), *(f"Failed: {text}" for text in self.failures)]

    def text_table(self, notes: Sequence[str] = ()) -> Table:
        """Return the table as texts: mean ± standard deviation, and differences with their interval."""
        rows = self.table
        columns: list[tuple[str, list[str]]] = [
            ("", [printable_name(row["group"], CELL) for row in rows]), ("seeds", [str(row["seeds"]) for row in rows]),
        ]  # fmt: skip
        for figure in self.figures:
            test_set, name = split_metric(figure)
            title = f"{short_set_title(test_set)} {short_title(name)}".strip()
            columns.append((title, [spread_text(figure, row[figure], row[f"{figure}_std"]) for row in rows]))
            if len(rows) > 1:
                columns.append((f"{title}: difference", [_difference(figure, row) for row in rows]))
        for name in TAKEN if self.target is not None else ():
            columns.append((f"{name} to target", [_target_text(name, row) for row in rows]))
        columns.append(("sent", [cost_text(human_bytes, row["bytes"]) for row in rows]))
        columns.append(("time", [cost_text(human_time, row["seconds"]) for row in rows]))
        titles, cells = zip(*columns, strict=True)
        return Table(titles, [[*row] for row in zip(*cells, strict=True)], self.title(), notes=notes)

    def title(self) -> str:
        data = filter(None, dict.fromkeys(run.data for run in self.runs))
        methods = dict.fromkeys(short_name(group.method) for group in self.groups)
        start = ", all seeds start from the same weights" if self.shared_start else ""
        return printable_name(" on ".join(filter(None, [", ".join(methods), ", ".join(data)])), CELL) + start

    @property
    def shared_start(self) -> bool:
        """Return whether all seeds of a group train copies of one module, which already has its weights."""
        runs = chain(*(group.runs.values() for group in self.groups if len(group.runs) > 1))
        starts = [run.config for run in runs if isinstance(run, OwnRun)]
        return any(start.model_sha256 and start.model.startswith(INSTANCE) for start in starts)

    def write(self, folder: Path) -> list[Path]:
        """Write the table's files and the picture, each completely or not at all, and return their paths."""
        from fedkern.report.figures.matplotlib_import import without_docstrings

        with without_docstrings():
            from fedkern.report.figures.curves import comparison_panels, draw_panels
            from fedkern.report.figures.plots import save_png, warn_of_missing_letters

        folder.mkdir(parents=True, exist_ok=True)
        table = self.text_table(self.all_sentences())
        texts = {CSV: csv_text(self.run_rows()), MARKDOWN: table.markdown(), LATEX: table.latex()}
        for name, text in texts.items():
            atomic.write_bytes(folder / name, text.encode())
        paths = [folder / name for name in texts]
        with warn_instead(lambda why: warnings.warn(f"{PICTURE} is missing: {why}.", stacklevel=2)):
            panels = comparison_panels(self.histories(), self.figures, chance=self.chance())
            if panels:
                save_png(draw_panels([*chain(*panels.values())], title=self.title()), folder / PICTURE)
                warn_of_missing_letters(warnings.warn)
                paths.append(folder / PICTURE)
        return paths

    def histories(self) -> dict[str, list[Sequence[Record]]]:
        return {group.label: [run.records for run in group.runs.values()] for group in self.groups}

    def chance(self) -> dict[str, float]:
        """Return the main figures of a constant prediction, by the first run, empty for runs of several data sets."""
        first_run = self.runs[0]
        if not isinstance(first_run, OwnRun) or len({run.data for run in self.runs}) > 1:
            return {}
        confusion = None if first_run.config.records == "private" else confusions.read(first_run.folder)
        figure_tables = [dict.fromkeys(self.figures), first_run.summary["metrics"]]
        return constant_figures(figure_tables, first_run.main, {}, confusion, 0)

    def to_json(self, folder: Path) -> object:
        content = {"table": self.table, "notes": self.sentences(), "failures": self.failures, "folder": str(folder)}
        return record_files.plain(content)


def cost_text(text: Callable[[float], str], cost: float | None) -> str:
    return "–" if cost is None else text(cost)


def spread_text(figure: str, mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "not told"
    if deviation is None:
        return human_metric(figure, mean)
    return f"{plus_minus(mean, deviation, partial(number_text, figure))} {scale(figure)[1]}".rstrip()


def _difference(figure: str, row: Mapping[str, Any]) -> str:
    mean, low, high = (row[f"{figure}_{part}"] for part in ("difference", "low", "high"))
    return "" if mean is None else interval_text(mean, low, high, partial(number_text, figure, sign="+"))


def _target_text(name: str, row: Mapping[str, Any]) -> str:
    mean, deviation = row[f"{name}_to_target"], row[f"{name}_to_target_std"]
    if mean is None:
        return f"reached by {row['reached']} of {row['seeds']}" if name == "rounds" else "–"
    rounds = "{:.0f}" if deviation is None else "{:.1f}"
    return plus_minus(mean, deviation, {"rounds": rounds.format, "bytes": human_bytes, "seconds": human_time}[name])


def _list_seeds(seeds: Sequence[int]) -> str:
    text = ", ".join(map(str, seeds[:10]))
    return text if len(seeds) <= 10 else f"{text} ..."


def _seeds(groups: Sequence[Group]) -> str:
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for group in groups:
        by_seeds.setdefault(tuple(group.runs), []).append(group.label)
    if len(by_seeds) == 1:
        seeds = next(iter(by_seeds))
        if len(seeds) == 1:
            return f"One seed ({seeds[0]}): no standard deviation; --seeds 3 gives one."
        return f"Mean ± standard deviation over {len(seeds)} seeds ({_list_seeds(seeds)})."
    parts = "; ".join(
        f"{', '.join(labels)}: {len(seeds)} seed{'s' * (len(seeds) > 1)} ({_list_seeds(seeds)})"
        for seeds, labels in by_seeds.items()
    )
    return f"Mean ± standard deviation over seeds, whose number differs: {parts}."


def _intervals(groups: Sequence[Group], figures: Sequence[str]) -> str:
    base = groups[0]
    points = " in percentage points" if all(scale(figure)[1] for figure in figures) else ""
    differences = f"Differences are to {base.label}{points}"
    shared_seeds = [group.shared_seeds(base).values() for group in groups[1:]]
    pairs = [sum(not is_other for is_other in answers) for answers in shared_seeds]
    if max(pairs) < 2:
        labels = ", on the same test labels" * any(True in answers for answers in shared_seeds)
        return f"{differences}; an interval needs two seeds in common{labels}, so none is given."
    fewest_pairs, most_pairs = min(pairs), max(pairs)
    count = f"{most_pairs}" if fewest_pairs == most_pairs else f"{fewest_pairs} to {most_pairs}"
    few_words = ", so few that it holds only if differences are nearly normal" if most_pairs < 6 else ""
    several = f"; the {len(pairs)} intervals are not corrected for their number" if len(pairs) > 1 else ""
    return (
        f"{differences}, paired by seed, each with a 95 % interval (Student's t) that rests on "
        f"{count} seeds{few_words}{several}."
    )


def label_notes(groups: Sequence[Group]) -> list[str]:
    """Return sentences on groups whose test labels are other ones than the first group's, or unknown."""
    base, notes = groups[0], []
    sentences = {
        True: "Not paired with {}, as the test labels differ: {}.",
        None: "Nothing shows that the test labels are those of {}, as a hash of them is missing: {}.",
    }
    for answer, sentence in sentences.items():
        if labels := [group.label for group in groups[1:] if answer in group.shared_seeds(base).values()]:
            notes.append(sentence.format(base.label, first_of(labels, SHOWN)))
    return notes


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
