"""The report of a comparison as a page: table, curves with bands, runs and settings."""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedkern.comparison.cells import spell_value
from fedkern.comparison.found_runs import OwnRun, group_runs, is_run, own_sets, read_run, read_runs, runs_inside
from fedkern.comparison.run_results import CSV, MARKDOWN, Result, cost_text, spread_text
from fedkern.comparison.seed_statistics import mean_std, plus_minus
from fedkern.engine.store.record_files import SUMMARY
from fedkern.errors import UserError, printable_name
from fedkern.files.filesystem import read_text
from fedkern.report.figures.curves import comparison_panels, describe_axes
from fedkern.report.names import CELL, capitalize
from fedkern.report.pages import html_page, run_page
from fedkern.report.pages.charts import bars, curves, dots
from fedkern.report.pages.html_page import Block, Code, Page, make_section, versions_table
from fedkern.report.run_contents import read_run_folder as read_contents
from fedkern.report.run_contents import sum_phases
from fedkern.report.tables import human_bytes, human_metric, human_time, sort_metrics
from fedkern.tasks.figure_names import figure_and_set, figure_title, number_text, scale, split_metric
from fedkern.text_table import Table

LISTED = 6
"""Most differences in the headline."""
MIN_SEEDS = 3
"""Fewest seeds for which an interval can say that groups differ."""
COLUMNS = 6
"""Most groups whose settings stand side by side."""


def holds_runs(folder: Path) -> bool:
    """Return whether a folder is a comparison's: one with its files, or with folders of runs."""
    return not is_run(folder) and ((folder / CSV).is_file() or bool(runs_inside(folder)))


def read_comparison(folder: Path) -> Result:
    """Return the comparison in a folder: the groups of ``comparison.csv``, or all finished runs in the folder.

    Raises:
        UserError: a run is missing, unfinished or damaged, or ``comparison.csv`` is damaged.
    """
    if not (folder / CSV).exists():
        return Result(group_runs(read_runs([folder])[0]))
    labels: dict[Path, str] = {}
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(folder / CSV))))
        entries = [(str(row["group"]), Path(row["folder"])) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError) as error:
        reason = f"it has no column {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{folder / CSV} is damaged ({reason}): compare the runs again.") from None
    for label, path in entries:
        inside = folder / path.name
        place = inside if is_run(inside) else path
        if not is_run(place):
            raise UserError(
                f"The comparison in {folder} names the run in {path}, which is not there: put it back, or compare the "
                "runs again."
            )
        labels[place] = label
    if not labels:
        raise UserError(f"{folder / CSV} names no run: compare the runs again.")
    return Result(group_runs([read_run(path) for path in labels], lambda run: labels[run.folder]))


def write_report(folder: Path, result: Result, *, commands: Mapping[str, str] | None = None) -> Path:
    """Write ``report.html`` of a comparison into its folder, and return its path.

    ``commands`` has the command that repeats a group's first run, by group name.
    """
    return html_page.write_page(page(folder, result, commands or {}), folder)


def page(folder: Path, result: Result, commands: Mapping[str, str]) -> Page:
    groups, runs = result.groups, result.runs
    own_runs = [(group.label, run) for group in groups for run in group.runs.values() if isinstance(run, OwnRun)]
    sections, baseline = [], []  # of the first run of fedkern, if there is one
    for label, first_run in own_runs[:1]:
        contents = read_contents(first_run.folder)
        title = printable_name(f"Clients of {label}, seed {first_run.seed}", CELL)
        sections = [make_section("clients", title, run_page.clients(contents))]
        baseline = [*run_page.describe_baseline(contents, judged=False)]
    diagnostics: dict[str, list[str]] = {}
    for run in runs:
        for name, text in dict(run.summary.get("diagnostics") or {}).items():
            diagnostics.setdefault(name, []).append(str(text))
    warnings = [
        (name, f"in {len(texts)} of {len(runs)} runs, such as: {texts[-1]}" if len(runs) > 1 else texts[-1])
        for name, texts in diagnostics.items()
    ]
    about = [f"{len(groups)} group{'s' * (len(groups) != 1)}", f"{len(runs)} run{'s' * (len(runs) != 1)}"]
    folders = {run.folder.resolve() for run in runs}
    inside = runs_inside(folder)
    if unfinished := sum(path.resolve() not in folders and not (path / SUMMARY).exists() for path in inside):
        about.append(f"{unfinished} not finished and left out")
    return Page(
        title=result.title(), about=" · ".join(about), tiles=_tiles(result),
        headline=[*headline(result), *baseline],
        warnings=[*warnings, *(("failed run", text) for text in result.failures)],
        sections=[
            make_section("table", "Table", _table(folder, result)),
            make_section("curves", "Curves", _curves(result)),
            make_section("finals", "Final figures of every run", _finals(result)),
            make_section("cost", "Bytes and time", _cost(result)),
            *sections,
            make_section("runs", "Runs", _runs(result)),
            make_section("settings", "Configuration and versions", _settings(result, commands)),
        ],
    )  # fmt: skip


def headline(result: Result) -> list[str]:
    if not result.figures:
        return ["The runs have no main figure, so nothing is compared."]
    base_row, *other_rows = result.table
    if not other_rows:
        parts = [f"{_figure_label(figure)} {_value(figure, base_row)}" for figure in result.figures]
        return [f"One group, {base_row['group']}, with {'; '.join(parts)}: nothing is compared."]
    # A sentence for every figure and group, worded by how far its interval supports a difference.
    sentences, sure, unsure = [], 0, 0
    for figure in result.figures:
        for row in other_rows:
            mean, low, high = (row[f"{figure}_{part}"] for part in ("difference", "low", "high"))
            if mean is None:
                continue
            title, both_groups = _figure_label(figure), f"{row['group']} and {base_row['group']}"
            points = number_text(figure, mean, "+") + " points" * bool(scale(figure)[1])
            far = f"{title}: {row['group']} is {points} from {base_row['group']}"
            if low is None or high is None:
                unsure += 1
                sentences.append(f"{far}, without an interval.")
                continue
            interval = f"{number_text(figure, low, '+')} to {number_text(figure, high, '+')}"
            if min(row["seeds"], base_row["seeds"]) < MIN_SEEDS:
                unsure += 1
                sentences.append(f"{far} (95 % interval {interval}, which two seeds can make narrow by accident).")
            elif low <= 0 <= high:
                sentences.append(f"{title}: {both_groups} cannot be told apart ({points}, 95 % interval {interval}).")
            else:
                sure += 1
                way = "higher" if mean > 0 else "lower"
                sentences.append(
                    f"{title}: {row['group']} is {way} than {base_row['group']} ({points}, 95 % interval {interval})."
                )
    # The opening warns first of too few seeds, then of groups that cannot be distinguished.
    seeds = min(row["seeds"] for row in result.table)
    if not sentences:
        return ["No two groups have a seed in common, so nothing is compared."]
    if unsure == len(sentences):
        opening = f"With {seeds} seed{'s' * (seeds != 1)} in the smallest group no difference can be told from chance."
    elif sure == 0:
        opening = f"No group can be told apart from {base_row['group']}: every 95 % interval holds 0."
    else:
        several = " (not corrected for their number)" if len(sentences) > 1 else ""
        opening = (
            f"{sure} of {len(sentences)} differences from {base_row['group']} have a 95 % interval without 0{several}."
        )
    remaining = len(sentences) - LISTED
    more_sentences = [f"{remaining} more differences are in the table."] if remaining > 0 else []
    return [opening, *sentences[:LISTED], *more_sentences]


def _figure_label(figure: str) -> str:
    return capitalize(figure_and_set(figure))


def _value(figure: str, row: Mapping[str, Any]) -> str:
    return spread_text(figure, row[figure], row[f"{figure}_std"])


def _tiles(result: Result) -> list[tuple[str, str]]:
    if not result.figures or len(result.groups) > COLUMNS:
        return []
    figure = result.figures[0]
    return [(f"{row['group']}: {_figure_label(figure).lower()}", _value(figure, row)) for row in result.table]


def _table(folder: Path, result: Result) -> Iterator[Block]:
    """Yield the table and sentences of ``comparison.md``, or make them again, and a table of all final figures."""
    table = _stored_table(folder) or result.text_table(result.sentences())
    yield from table.notes
    yield replace(table, title="")
    figures, sets = dict.fromkeys((name for run in result.runs for name in run.metrics), 0.0), own_sets(result.groups)
    body = []
    for name in sort_metrics(figures, sets, result.runs[0].main):
        if split_metric(name, sets)[0] != "validation":
            values = [list(group.values(name).values()) for group in result.groups]
            text = partial(human_metric, name)
            body.append([_figure_label(name), *(plus_minus(*mean_std(row), text) if row else "" for row in values)])
    caption = "All final figures: mean ± standard deviation over the runs"
    yield Table(["figure", *(group.label for group in result.groups)], body, caption)


def _stored_table(folder: Path) -> Table | None:
    """Return table and sentences of ``comparison.md``, None unless the file has its usual form."""
    try:
        return Table.of_markdown(read_text(folder / MARKDOWN))
    except (OSError, UnicodeDecodeError):
        return None


def _curves(result: Result) -> Iterator[Block]:
    panels = comparison_panels(result.histories(), result.figures, chance=result.chance())
    for place, figure in enumerate(result.figures):
        if figure in panels:
            title = f"{_figure_label(figure)}, over {describe_axes(panels[figure])}"
            yield curves(f"curve-{place}", title, panels[figure])


def _finals(result: Result) -> Iterator[Block]:
    note = "A circle is a run; the filled mark is the mean, with a bar of one standard deviation."
    for place, figure in enumerate(result.figures):
        groups, (factor, unit) = [], scale(figure)
        for group in result.groups:
            if values := [factor * value for value in group.values(figure).values()]:
                groups.append((group.label, values, *mean_std(values)))
        if groups:
            axis = figure_title(split_metric(figure)[1])
            yield dots(f"final-{place}", _figure_label(figure), groups, axis=axis, unit=unit, note=note)


def _cost(result: Result) -> Iterator[Block]:
    labels, table = [group.label for group in result.groups], result.table
    sent = {"sent": [row["bytes"] for row in table]}
    yield bars("bytes", "Sent in both directions, mean of the runs", labels, sent, axis="sent", unit="B")
    phases = [sum_phases(*(run.summary.get("phases") or {} for run in group.runs.values()))
              for group in result.groups]  # fmt: skip
    seconds = {"whole run": [row["seconds"] for row in table]}
    for name in dict.fromkeys(name for phase in phases for name in phase if "/" not in name):
        seconds[name] = [
            phase.get(name, 0.0) / len(group.runs) for phase, group in zip(phases, result.groups, strict=True)
        ]
    yield bars("time", "Time, mean of the runs", labels, seconds, axis="time", unit="s")


def _runs(result: Result) -> Iterator[Block]:
    header = ["group", "seed", *map(_figure_label, result.figures), "sent", "time", "warnings", "folder"]
    rows = []
    for group in result.groups:
        for seed, run in group.runs.items():
            figures = [human_metric(name, run.metrics[name]) if name in run.metrics else "" for name in result.figures]
            warnings = ", ".join(map(str, run.summary.get("diagnostics") or ()))
            rows.append(
                [group.label, str(seed), *figures, cost_text(human_bytes, run.summary["bytes"]["total"]),
                 cost_text(human_time, run.summary["seconds"]), warnings, run.folder.name]
            )  # fmt: skip
    yield Table(header, rows)


def _settings(result: Result, commands: Mapping[str, str]) -> Iterator[Block]:
    if commands:
        yield "The commands that repeat the first run of every group:"
        yield from map(Code, commands.values())
    labels = [group.label for group in result.groups]
    runs = [next(iter(group.runs.values())) for group in result.groups]
    tables, own_tables = [run.settings for run in runs], [run.settings for run in runs if isinstance(run, OwnRun)]
    names = list(dict.fromkeys(name for table in tables for name in table))
    # A recorded run that does not name a setting may have any value.
    values = {name: [t.get(name) for t in tables if name in t or t in own_tables] for name in names}
    differ = [name for name in names if len({*map(str, values[name])}) > 1]
    if differ:
        cells = {name: [spell_value(table[name]) if name in table else "" for table in tables] for name in differ}
        if len(tables) > COLUMNS:
            labels, cells = ["values"], {k: [", ".join(filter(None, dict.fromkeys(v)))] for k, v in cells.items()}
        rows = [[name, *texts] for name, texts in cells.items()]
        yield Table(["setting", *labels], rows, "Settings that differ", words=1 + len(labels))
    same_rows = [[name, spell_value(values[name][0])] for name in names if name not in differ]
    caption = f"Settings of all groups{'' if len(own_tables) == len(tables) else ' that name them'}"
    yield Table(["setting", "value"], same_rows, caption, words=2)
    yield versions_table(run.summary.get("versions") or {} for run in result.runs)
