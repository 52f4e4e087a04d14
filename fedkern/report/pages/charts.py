"""Charts of a report: curves, bars and dots as SVG, each with a text and a table of the same figures."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedkern.report.figures import plots
from fedkern.report.figures.curves import THIN, Curve, Panel, draw_panels
from fedkern.report.figures.plots import COLOURS, MARKERS, PAGE
from fedkern.report.names import TITLE, capitalize, entry, label
from fedkern.report.pages.html_page import Chart
from fedkern.report.tables import in_unit
from fedkern.text_table import Table

ROWS, COLUMNS, TOLD = 30, 20, 6
"""Most rows and columns of a chart's table, and most curves in a chart's text."""
BARS = 40


def curves(name: str, title: str, panels: Sequence[Panel], *, note: str = "") -> Chart:
    """Return panels of curves, at least one, with the ends of each curve as text and a table for each panel."""
    tables, parts = [], []
    for panel in panels:
        if panel.along == "bytes_up":  # its values are those over simulated time
            continue
        lines = [curve for curve in panel.summary or panel.curves if curve.rounds and curve.look is not THIN]
        axis = panel.axis.replace("\n", " ") if len({peer.axis for peer in panels}) > 1 else ""
        where = f"{axis}, " if axis else ""
        for curve in lines:
            points = [(x, y) for x, y in zip(curve.rounds, curve.values, strict=True) if _finite(y)]
            if points:
                ends = [f"{in_unit(y, panel.unit)} in round {x}" for x, y in dict.fromkeys((points[0], points[-1]))]
                parts.append(f"{where}{curve.name}: {', '.join(ends)}")
        tables += [_rounds_table(lines, panel.unit, axis)] if lines else []
    more_words = f"; and {len(parts) - TOLD} more" if len(parts) > TOLD else ""
    return chart(name, title, f"{'; '.join(parts[:TOLD])}{more_words}.", draw_panels(panels, page=True), tables, note)


def bars(
    name: str, title: str, labels: Sequence[str], series: Mapping[str, Sequence[float | None]], *, axis: str,
    unit: str = "", note: str = "", falls: bool = False,
) -> Chart:  # fmt: skip
    """Return horizontal bars, one of every series for every label.

    Of many labels those with the worst values are drawn: the lowest, or the highest if the figure ``falls``.
    """
    order = list(range(len(labels)))
    if len(order) > BARS:
        finite = [[y for values in series.values() if _finite(y := values[i])] for i in order]
        worst = [min((-y if falls else y for y in values), default=math.inf) for values in finite]
        order = sorted(order, key=lambda i: worst[i])[:BARS]
        note = " ".join(filter(None, [f"The {BARS} {'highest' if falls else 'lowest'} of {len(labels)}.", note]))
    figure, axes = _rows([labels[i] for i in order], axis, unit, 0.8 + len(order) * (0.12 + 0.18 * len(series)))
    thick, parts = 0.85 / len(series), []
    for number, (key, values) in enumerate(series.items()):
        places = np.arange(len(order)) + thick * (number - (len(series) - 1) / 2)
        widths = [y if _finite(y := values[i]) else 0.0 for i in order]
        drawing = axes.barh(places, widths, 0.9 * thick, color=COLOURS[number % len(COLOURS)], label=entry(key))
        axes.bar_label(drawing, [in_unit(values[i], unit) for i in order], padding=3, fontsize=9)
        if points := [(y, -i) for i, y in enumerate(values) if _finite(y)]:
            (low, low_at), (high, high_at) = min(points, key=lambda point: (point[0], -point[1])), max(points)
            parts.append(
                f"{key + ': ' if len(series) > 1 else ''}lowest {in_unit(low, unit)} ({labels[-low_at]}), highest "
                f"{in_unit(high, unit)} ({labels[-high_at]})"
            )
    axes.margins(x=0.12)
    if len(series) > 1:
        plots.legend_below(figure)
    rows = [[labels[i], *(in_unit(values[i], unit) for values in series.values())] for i in order]
    return chart(name, title, f"{'; '.join(parts)}.", figure, [Table(["", *series], rows)], note)


def dots(
    name: str, title: str, groups: Sequence[tuple[str, Sequence[float], float, float | None]], *, axis: str,
    unit: str = "", note: str = "",
) -> Chart:  # fmt: skip
    """Return a dot for every run, and the mean of every group with a bar of one standard deviation.

    A group has a name, the values of its runs, their mean, and their standard deviation or None.
    """
    figure, axes = _rows([group for group, *_ in groups], axis, unit, 1.0 + 0.45 * len(groups))
    rows = []
    for number, (group, values, mean, deviation) in enumerate(groups):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(values, [number] * len(values), "o", color=colour, mfc="none", ms=7)
        axes.errorbar(mean, number, xerr=deviation, fmt=MARKERS[number % len(MARKERS)], color=colour, ms=9, capsize=5)
        rows.append([group, ", ".join(in_unit(value, unit) for value in values), in_unit(mean, unit),
                     in_unit(deviation, unit)])  # fmt: skip
    text = "; ".join(f"{group}: mean {mean}, runs {values}" for group, values, mean, _ in rows)
    table = Table(["", "runs", "mean", "standard deviation"], rows)
    return chart(name, title, f"{text}.", figure, [table], note)


def counts_table(
    counts: Sequence[Sequence[int]], rows: Sequence[str], columns: Sequence[str], *, row: str, column: str
) -> Table:
    """Return counts by row and column, of many those evenly spread."""
    places, lines = plots.spread_evenly(len(columns), COLUMNS), plots.spread_evenly(len(rows), ROWS)
    body = [[rows[i], *(f"{int(counts[i][j]):,}" for j in places)] for i in lines]
    parts = [f"{len(lines)} of {len(rows)} rows" * (len(lines) < len(rows)),
             f"{len(places)} of {len(columns)} columns" * (len(places) < len(columns))]  # fmt: skip
    caption = "; ".join(["number of samples", *filter(None, parts)])
    return Table([f"{row} \\ {column}", *(columns[j] for j in places)], body, caption)


def _rounds_table(series: Sequence[Curve], unit: str, caption: str) -> Table:
    """Return values of curves by round, of many rounds those evenly spread."""
    rounds = sorted({x for curve in series for x in curve.rounds})
    shown_rounds = [rounds[i] for i in plots.spread_evenly(len(rounds), ROWS)]
    values = [dict(zip(curve.rounds, curve.values, strict=True)) for curve in series]
    rows = [[str(r), *(in_unit(curve_values.get(r), unit) for curve_values in values)] for r in shown_rounds]
    part = f"{len(shown_rounds)} of {len(rounds)} rounds" if len(shown_rounds) < len(rounds) else ""
    return Table(["round", *(curve.name for curve in series)], rows, ", ".join(filter(None, [caption, part])))


def chart(name: str, title: str, text: str, figure: Figure, tables: Sequence[Table], note: str = "") -> Chart:
    return Chart(name, capitalize(title), text, plots.to_svg(figure, name), tables, note)


def _rows(names: Sequence[str], axis: str, unit: str, height: float) -> tuple[Figure, Axes]:
    figure = plots.new_figure(PAGE, height)
    axes = figure.subplots()
    plots.add_frame(axes)
    axes.set_axisbelow(True)
    axes.grid(False, axis="y")
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(plots.wrap_text(label(axis, TITLE), 12, 3.5) + " (%)" * (unit == "%"), fontsize=12)
    if unit in ("B", "s"):
        axes.xaxis.set_major_formatter(lambda value, _: in_unit(value, unit))
        axes.xaxis.set_major_locator(MaxNLocator(4))  # texts such as "3 min 20 s" are long
    return figure, axes


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
