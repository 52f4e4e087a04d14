"""The table of a reproduction: published figures beside ours, with verdicts, as Markdown, CSV and a page."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fedkern.comparison.published import ROUNDS, Paper, PublishedCell
from fedkern.comparison.seed_statistics import Difference, interval_text
from fedkern.comparison.verdicts import NO_DATA, VERDICTS, Outcome, Verdict, figure_text
from fedkern.errors import first_of, join_words
from fedkern.report.figures.curves import Groups, comparison_panels, describe_axes
from fedkern.report.pages.charts import curves
from fedkern.report.pages.html_page import Block, Code, Page, make_section
from fedkern.report.tables import human_metric, human_time
from fedkern.text_table import Table

HEADER = ("table", "cell", "published", "ours", "to the baseline", "seeds", "swept, first seed", "verdict")


@dataclass(frozen=True)
class Row:
    """A cell of a paper with its verdict.

    Attributes:
        outcome: of all runs, None unless all are finished.
        curves: of a cell with a target, the round records of every started run, by curve name.
        notes: sentences on the comparison with the baseline.
    """

    cell: PublishedCell
    verdict: Verdict
    outcome: Outcome | None
    folder: str
    curves: Groups = field(default_factory=dict)
    notes: Sequence[str] = ()

    def texts(self) -> list[str]:
        cell, verdict, outcome = self.cell, self.verdict, self.outcome
        published = "" if cell.published is None else figure_text(cell, cell.published)
        ours = "" if verdict.ours is None else _interval(cell, verdict.ours)
        gap = "" if verdict.gap is None else _interval(cell, verdict.gap, "+")
        if gap and verdict.published_gap is not None:
            gap += f", published {figure_text(cell, verdict.published_gap, '+')}"
        seeds, effect = ("", "") if outcome is None else (str(len(outcome.values)), outcome.effect)
        # The sentences below the table have the reason, which many cells share.
        short = verdict.kind if verdict.kind == NO_DATA else str(verdict)
        return [cell.table, cell.name, published, ours, gap, seeds, effect, short]

    def values(self) -> dict[str, object]:
        cell, verdict, outcome = self.cell, self.verdict, self.outcome
        keys = ("table", "name", "figure", "target", "baseline", "published")
        row = {key: getattr(cell, key) for key in keys}
        for name, difference in (("ours", verdict.ours), ("gap", verdict.gap)):
            for part in ("mean", "low", "high"):
                row[name if part == "mean" else f"{name}_{part}"] = getattr(difference, part, None)
        row |= {"published_gap": verdict.published_gap, "verdict": verdict.kind, "detail": verdict.detail}
        row |= {key: getattr(cell, key) for key in ("smaller", "tolerance", "source")}
        if outcome is not None:
            values = " ".join(f"{seed}={value}" for seed, value in outcome.values.items())
            row |= {"values": values, "swept": outcome.effect, "seconds": outcome.seconds}
            row |= {"bytes": outcome.bytes, "bytes_up": outcome.up, "fedkern": outcome.build, "date": outcome.date}
            row["recorded"] = outcome.recorded
        return {**row, "command": cell.command, "folder": self.folder}


def text_table(paper: Paper, rows: Sequence[Row]) -> Table:
    return Table(HEADER, [row.texts() for row in rows], _title(paper), notes=[summary(rows), *sentences(paper, rows)])


def page(paper: Paper, rows: Sequence[Row]) -> Page:
    tables = dict.fromkeys(row.cell.table for row in rows)
    sections = [
        make_section(f"table-{number}", f"Table {name}", _table([row for row in rows if row.cell.table == name]))
        for number, name in enumerate(tables)
    ]
    curved = make_section("curves", "Curves", _curves(rows))
    notes = make_section("notes", "What the table rests on", sentences(paper, rows))
    commands = make_section("commands", "Commands", _commands(paper))
    about = f"{len(rows)} cells · {paper.citation}" if paper.citation else f"{len(rows)} cells"
    return Page(_title(paper), about, [summary(rows)], [], [], [*sections, curved, notes, commands])


def summary(rows: Sequence[Row]) -> str:
    counts = {kind: sum(row.verdict.kind == kind for row in rows) for kind in VERDICTS}
    return f"{join_words([f'{count} {kind}' for kind, count in counts.items() if count])}, of {len(rows)} cells."


def sentences(paper: Paper, rows: Sequence[Row]) -> list[str]:
    texts = [f"Published figures: {paper.citation}." if paper.citation else "", paper.note]
    sources = by_reason((row.cell.source, row.cell.name) for row in rows)
    texts += [f"{source}: {'; '.join(names)}." for source, names in sources.items()]
    absent = by_reason((row.verdict.detail * (row.verdict.kind == NO_DATA), row.cell.name) for row in rows)
    texts += [f"No data for {first_of(names, 3)}: {reason}" for reason, names in absent.items()]
    explanations = {
        "Ours: mean over the seeds, with a 95 % interval (Student's t); differences to a baseline are paired by seed. "
        "Intervals are not corrected for their number.": any(row.outcome is not None for row in rows),
        "Rounds: up to the target on the curve of the best values so far, interpolated linearly between evaluated "
        "rounds (McMahan et al., arXiv 1602.05629, section 3).": any(row.cell.figure == ROUNDS for row in rows),
        "Swept settings: the best point by the first seed's own figure, on the test set; this seed is among those "
        "reported.": any(row.cell.sweep and row.cell.select == "figure" for row in rows),
    }
    texts += [text for text, is_needed in explanations.items() if is_needed]
    texts += [f"{row.cell.name}, smaller scale: {row.cell.smaller}." for row in rows if row.cell.smaller]
    texts += [note for row in rows for note in row.notes]
    outcomes = {row.cell.name: row.outcome for row in rows if row.outcome is not None}
    recorded = [f"{name} ({outcome.recorded})" for name, outcome in outcomes.items() if outcome.recorded]
    texts += [f"Recorded runs, not played by this command: {'; '.join(recorded)}."] if recorded else []
    played = [outcome for outcome in outcomes.values() if not outcome.recorded]
    if played:
        seconds = sum(outcome.seconds or 0 for outcome in played)
        builds = ", ".join(dict.fromkeys(outcome.build for outcome in played))
        texts.append(f"Played with fedkern {builds}; the reported runs took {human_time(seconds)} together.")
    return [text for text in texts if text]


def by_reason(cells: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return names of cells by reason, from pairs of reason and name, without empty reasons."""
    names: dict[str, list[str]] = {}
    for reason, name in cells:
        if reason:
            names.setdefault(reason, []).append(name)
    return names


def _table(rows: Sequence[Row]) -> Iterator[Block]:
    yield Table(HEADER[1:], [row.texts()[1:] for row in rows])


def _curves(rows: Sequence[Row]) -> Iterator[Block]:
    for place, row in enumerate(rows):
        if row.cell.goal is not None and row.curves:
            figure = row.cell.goal.figure
            target = f"target {human_metric(figure, row.cell.goal.value)}"
            for panels in comparison_panels(row.curves, [figure], chance={figure: row.cell.goal.value}).values():
                drawn_panels = [replace(panel, level_name=target) for panel in panels]
                title = f"{row.cell.name}: {panels[0].axis}, over {describe_axes(panels)}"
                yield curves(f"curve-{place}", title, drawn_panels)


def _commands(paper: Paper) -> Iterator[Block]:
    for before in paper.befores.values():
        yield f"{before.name}, played before others"
        yield Code(paper.text(before.command))
    for cell in paper.cells:
        yield cell.name
        sweeps = "".join(f" --sweep {sweep}" for sweep in cell.sweep)
        yield Code(paper.text(cell.command) + sweeps if cell.command else f"recorded runs: {', '.join(cell.runs)}")


def _title(paper: Paper) -> str:
    return paper.title or paper.name


def _interval(cell: PublishedCell, ours: Difference, sign: str = "") -> str:
    return interval_text(ours.mean, ours.low, ours.high, partial(figure_text, cell, sign=sign))
