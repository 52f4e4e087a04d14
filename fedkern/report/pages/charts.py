"""Charts of a report: curves, bars and dots drawn as SVG, with a text and a table of the same figures each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedkern.report.figures.fitting import fitted
from fedkern.report.figures.plots import (
    COLOURS,
    DASHES,
    GREY,
    LOW,
    MARKERS,
    NARROW,
    frame,
    from_zero,
    legend_below,
    new_figure,
    over_rounds,
    svg,
)
from fedkern.report.names import TITLE, entry, label
from fedkern.report.pages.html_page import Chart, Table
from fedkern.report.tables import human_bytes, human_time

WIDTH = 5.2
"""Inches of a chart of bars or dots: so narrow that a phone shows the whole of it with letters large enough."""
ROWS, COLUMNS, TOLD = 30, 20, 6
"""Most rows and columns of a chart's table, and series that a chart's text tells of."""
BARS = 40
"""Most labels that have bars."""


@dataclass(frozen=True)
class Series:
    """A curve over rounds ``x``, or a set of bars without them; a value that is not finite leaves a gap.

    A ``soft`` curve is drawn in grey, dashed and without markers.
    """

    name: str
    x: Sequence[int] = ()
    y: Sequence[float | None] = ()
    soft: bool = False


def shown(value: float | None, unit: str) -> str:
    """A value as text.

    Args:
        value: the value; None is shown as a dash.
        unit: ``"%"`` (one decimal), ``"B"``, ``"s"``, ``"images"`` (whole numbers), or ``""`` (three digits).
    """
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "%":
        return f"{value:.1f} %"
    if unit == "B":
        return human_bytes(value)
    if unit == "s":
        return human_time(value)
    return f"{value:,.0f}" if unit == "images" else f"{value:.3g}"


def scaled(values: Iterable[float | None], factor: float) -> list[float | None]:
    """Values times a factor, None where there is none."""
    return [None if value is None else factor * value for value in values]


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` positions of ``count``, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def of_rounds(
    name: str, title: str, figure: Figure, series: Sequence[Series], *, unit: str = "", note: str = ""
) -> Chart:
    """A figure of curves, which is made smaller, as a chart with a text and a table of its series."""
    figure.set_size_inches(NARROW * figure.get_figwidth(), LOW * figure.get_figheight())
    return Chart(name, title, _told(series, unit), svg(figure, name), [rounds_table(series, unit)], note)


def curves(
    name: str, title: str, series: Sequence[Series], *, axis: str, unit: str = "", note: str = "", zero: bool = True
) -> Chart:
    """Curves over the communication rounds.

    The vertical axis begins at 0, unless not ``zero``: that would flatten a loss that stays far above.
    """
    figure = new_figure(WIDTH / NARROW, 2.9 / LOW)
    axes = figure.subplots()
    number = 0
    for one in series:
        every = max(1, len(one.x) // 12)
        y = np.array(one.y, dtype=np.float64)
        if one.soft:
            axes.plot(one.x, y, "--", color=GREY, lw=2, label=entry(one.name))
            continue
        axes.plot(
            one.x, y, DASHES[number // len(COLOURS) % len(DASHES)], color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)], markevery=every, ms=5, lw=2, label=entry(one.name),
        )  # fmt: skip
        number += 1
    over_rounds(axes)
    rounds = [x for one in series for x in one.x]
    axes.set_xlim(min(rounds) - 0.5, max(rounds) + 0.5)
    from_zero(axes, zero)
    _name(axes.yaxis, axis, unit)
    if len(series) > 1:
        legend_below(figure)
    return of_rounds(name, title, figure, series, unit=unit, note=note)


def bars(
    name: str, title: str, labels: Sequence[str], series: Sequence[Series], *, axis: str, unit: str = "",
    note: str = "", falls: bool = False,
) -> Chart:  # fmt: skip
    """Horizontal bars, a group of them for every label; of many labels those with the worst values.

    These are the lowest values, or the highest ones where the figure ``falls``.
    """
    order = list(range(len(labels)))
    if len(order) > BARS:
        finite = [[y for one in series if (y := one.y[i]) is not None and math.isfinite(y)] for i in order]
        worst = [min((-value if falls else value for value in values), default=math.inf) for values in finite]
        order = sorted(order, key=lambda i: worst[i])[:BARS]
        note = " ".join(filter(None, [f"The {BARS} {'highest' if falls else 'lowest'} of {len(labels)}.", note]))
    figure = new_figure(WIDTH, 0.8 + len(order) * (0.12 + 0.18 * len(series)))
    axes = figure.subplots()
    thick = 0.85 / len(series)
    for number, one in enumerate(series):
        values = [one.y[i] for i in order]
        places = np.arange(len(order)) + thick * (number - (len(series) - 1) / 2)
        widths = [0.0 if value is None or not math.isfinite(value) else value for value in values]
        drawn = axes.barh(places, widths, 0.9 * thick, color=COLOURS[number % len(COLOURS)], label=entry(one.name))
        axes.bar_label(drawn, [shown(value, unit) for value in values], padding=3, fontsize=9)
    _rows(axes, [labels[i] for i in order])
    axes.margins(x=0.12)
    _name(axes.xaxis, axis, unit, room=3.5)
    if unit in ("B", "s"):
        axes.xaxis.set_major_locator(MaxNLocator(4))  # texts such as "3 min 20 s" are long
    if len(series) > 1:
        legend_below(figure, 1, 1)
    rows = [[labels[i], *(shown(one.y[i], unit) for one in series)] for i in order]
    told = []
    for one in series:
        if known := [(value, i) for i, value in enumerate(one.y) if value is not None and math.isfinite(value)]:
            (low, where), (high, other) = min(known), max(known, key=lambda pair: (pair[0], -pair[1]))
            told.append(
                f"{one.name + ': ' if len(series) > 1 else ''}lowest {shown(low, unit)} ({labels[where]}), highest "
                f"{shown(high, unit)} ({labels[other]})"
            )
    table = Table(["", *(one.name for one in series)], rows)
    return Chart(name, title, f"{'; '.join(told)}.", svg(figure, name), [table], note)


def dots(
    name: str, title: str, groups: Sequence[tuple[str, Sequence[float], float, float | None]], *, axis: str,
    unit: str = "", note: str = "",
) -> Chart:  # fmt: skip
    """A dot for every run, and the mean of every group with a bar of one standard deviation.

    A group has a name, the values of its runs, their mean, and their standard deviation or None.
    """
    figure = new_figure(WIDTH, 1.0 + 0.45 * len(groups))
    axes = figure.subplots()
    for number, (_, values, mean, deviation) in enumerate(groups):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(values, [number] * len(values), "o", color=colour, mfc="none", ms=7)
        axes.errorbar(mean, number, xerr=deviation, fmt=MARKERS[number % len(MARKERS)], color=colour, ms=9, capsize=5)
    _rows(axes, [group for group, *_ in groups])
    _name(axes.xaxis, axis, unit, room=3.5)
    rows = [
        [group, ", ".join(shown(value, unit) for value in values), shown(mean, unit), shown(deviation, unit)]
        for group, values, mean, deviation in groups
    ]
    text = "; ".join(f"{row[0]}: mean {row[2]}, runs {row[1]}" for row in rows)
    table = Table(["", "runs", "mean", "standard deviation"], rows)
    return Chart(name, title, f"{text}.", svg(figure, name), [table], note)


def counts_table(
    counts: Sequence[Sequence[int]], rows: Sequence[str], columns: Sequence[str], *, row: str, column: str
) -> Table:
    """Numbers of images by row and column; of many rows or columns those evenly spread."""
    places, lines = evenly(len(columns), COLUMNS), evenly(len(rows), ROWS)
    body = [[rows[i], *(f"{int(counts[i][j]):,}" for j in places)] for i in lines]
    parts = [f"{len(lines)} of {len(rows)} rows" * (len(lines) < len(rows)),
             f"{len(places)} of {len(columns)} columns" * (len(places) < len(columns))]  # fmt: skip
    caption = "; ".join(["number of samples", *filter(None, parts)])
    return Table([f"{row} \\ {column}", *(columns[j] for j in places)], body, caption)


def rounds_table(series: Sequence[Series], unit: str, caption: str = "") -> Table:
    """Values of curves by round; of many rounds those evenly spread."""
    rounds = sorted({x for one in series for x in one.x})
    kept = [rounds[i] for i in evenly(len(rounds), ROWS)]
    values = [dict(zip(one.x, one.y, strict=True)) for one in series]
    rows = [[str(r), *(shown(each.get(r), unit) for each in values)] for r in kept]
    some = f"{len(kept)} of {len(rounds)} rounds" if len(kept) < len(rounds) else ""
    return Table(["round", *(one.name for one in series)], rows, ", ".join(filter(None, [caption, some])))


def _told(series: Sequence[Series], unit: str) -> str:
    """The first and the last value of curves, as a sentence."""
    parts = []
    for one in series[:TOLD]:
        known = [(x, y) for x, y in zip(one.x, one.y, strict=True) if y is not None and math.isfinite(y)]
        if not known:
            continue
        (first, begin), (last, end) = known[0], known[-1]
        so = f"{shown(begin, unit)} in round {first}"
        parts.append(f"{one.name}: {so}" + (f", {shown(end, unit)} in round {last}" if last != first else ""))
    more = f"; and {len(series) - TOLD} more" if len(series) > TOLD else ""
    return f"{'; '.join(parts)}{more}."


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Names rows of bars or dots, the first one at the top."""
    frame(axes)
    axes.set_axisbelow(True)
    axes.grid(False, axis="y")
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _name(axis: Axis, title: str, unit: str, room: float = 2.2) -> None:
    """Gives an axis its title, in lines of ``room`` inches, and ticks with units where a unit has prefixes."""
    text = fitted(label(title, TITLE), 12, room)
    axis.set_label_text(f"{text} (%)" if unit == "%" else text, fontsize=12)
    if unit in ("B", "s"):
        axis.set_major_formatter(lambda value, _: shown(value, unit))
