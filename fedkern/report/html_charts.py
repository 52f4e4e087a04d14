"""Charts of a report: curves, bars, heat maps and dots, as figures of plotly with a text and a table each.

A series is told from others by its colour (of Okabe and Ito's palette), and by its dashes and markers or its pattern.
``meta`` of a trace holds ``slot``, the number of its colour; ``soft``, for grey; ``band``, for the faint area of a
curve; or ``scale``, for the colours of a heat map.  ``templates/report.js`` paints with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedkern.report.html_page import Chart, Table
from fedkern.report.names import TICK, label
from fedkern.report.tables import human_bytes, human_time

SLOTS = 7
"""Colours of the page's palettes."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star", "pentagon")
PATTERNS = ("", "/", ".", "x", "\\", "-", "+")
POINTS, ROWS, TOLD = 400, 30, 6
"""Most points of a curve, rows of a curve's table, and series that a chart's text tells of."""
ROWS_OF_BARS = 40
CELL_ROWS, CELL_COLUMNS = 20, 12
"""Most rows and columns of a heat map that has its numbers written into it."""


@dataclass(frozen=True)
class Series:
    """A curve or a set of bars.

    Attributes:
        name: name in the legend.
        x: rounds of a curve; empty for bars.
        y: values; None or a number that is not finite leaves a gap.
        low, high: edges of a curve's band; empty without one.
        soft: drawn in grey, dashed and without markers.
    """

    name: str
    x: Sequence[int] = ()
    y: Sequence[float | None] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    soft: bool = False


def shown(value: float | None, unit: str) -> str:
    """A value as text.

    Args:
        value: the value; None is shown as a dash.
        unit: ``"%"`` (one decimal), ``"B"``, ``"s"``, ``"images"`` (whole numbers), or ``""`` (three digits).
    """
    number = _number(value)
    if number is None:
        return "–"
    if unit == "%":
        return f"{number:.1f} %"
    if unit == "B":
        return human_bytes(number)
    if unit == "s":
        return human_time(number)
    return f"{number:,.0f}" if unit == "images" else f"{number:.3g}"


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` positions of ``count``, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def curves(name: str, title: str, series: Sequence[Series], *, axis: str, unit: str = "", note: str = "") -> Chart:
    """Curves over the communication rounds.

    Args:
        name, title, note: see `fedkern.report.html_page.Chart`.
        series: at least one, each with a point.
        axis: title of the vertical axis.
        unit: see :func:`shown`; ``"B"`` and ``"s"`` choose a prefix for the axis.
    """
    scale, word = _scaled(series, unit)
    data: list[dict[str, Any]] = []
    number = 0
    for one in series:
        at = evenly(len(one.x), POINTS)
        x = [one.x[i] for i in at]
        meta: dict[str, Any] = {"soft": True} if one.soft else {"slot": number % SLOTS}
        called = _literal(one.name, 40)
        if len(one.low):
            low, high = ([_scaled_value(edge[i], scale) for i in at] for edge in (one.low, one.high))
            common = {"type": "scatter", "mode": "lines", "x": x, "hoverinfo": "skip", "showlegend": False,
                      "legendgroup": called, "meta": {**meta, "band": True}, "line": {"width": 0}}  # fmt: skip
            data += [{**common, "y": low}, {**common, "y": high, "fill": "tonexty"}]
        trace = {
            "type": "scatter",
            "mode": "lines" if one.soft else "lines+markers",
            "name": called,
            "legendgroup": called,
            "x": x,
            "y": [_scaled_value(one.y[i], scale) for i in at],
            "text": [shown(one.y[i], unit) for i in at],
            "hovertemplate": "%{text}<br>round %{x}<extra>%{fullData.name}</extra>",
            "meta": meta,
            "line": {"width": 2, "dash": "dash" if one.soft else DASHES[number % len(DASHES)]},
            "marker": {"size": 7, "symbol": SYMBOLS[number % len(SYMBOLS)], "maxdisplayed": 12},
        }
        data.append(trace)
        number += not one.soft
    layout = {
        "height": 330 + 18 * (len(series) // 3),
        "showlegend": len(series) > 1,
        "xaxis": {"title": {"text": "communication round"}, **_whole([x for one in series for x in one.x])},
        "yaxis": {"title": {"text": f"{axis} ({word})" if word else axis}, "rangemode": "tozero"},
    }
    rounds = sorted({x for one in series for x in one.x})
    kept = [rounds[i] for i in evenly(len(rounds), ROWS)]
    values = [dict(zip(one.x, one.y, strict=True)) for one in series]
    rows = [[str(r), *(shown(each.get(r), unit) for each in values)] for r in kept]
    caption = f"{len(kept)} of {len(rounds)} rounds" if len(kept) < len(rounds) else ""
    table = Table(["round", *(one.name for one in series)], rows, caption)
    return Chart(name, title, _told(series, unit), data, layout, table, note)


def bars(
    name: str, title: str, labels: Sequence[str], series: Sequence[Series], *, axis: str, unit: str = "", note: str = ""
) -> Chart:
    """Horizontal bars, a group of them for every label; of many labels those with the lowest values.

    Args:
        name, title, note: see `fedkern.report.html_page.Chart`.
        labels: names beside the bars.
        series: values by label.
        axis: title of the horizontal axis.
        unit: see :func:`shown`.
    """
    order = list(range(len(labels)))
    if len(order) > ROWS_OF_BARS:
        order = sorted(order, key=lambda i: min((v for one in series if (v := _number(one.y[i])) is not None),
                                                default=math.inf))[:ROWS_OF_BARS]  # fmt: skip
        note = " ".join(filter(None, [f"The {ROWS_OF_BARS} lowest of {len(labels)}.", note]))
    scale, word = _scaled(series, unit)
    ticks = _apart([_literal(labels[i]) for i in order])
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": _literal(one.name, 40),
            "x": [_scaled_value(one.y[i], scale) for i in order],
            "y": ticks,
            "customdata": [shown(one.y[i], unit) for i in order],
            "hovertemplate": "%{y}: %{customdata}<extra>%{fullData.name}</extra>",
            "meta": {"slot": number % SLOTS},
            "marker": {
                "pattern": {
                    "shape": PATTERNS[number % len(PATTERNS)],
                    "size": 6,
                    "solidity": 0.25,
                    "fillmode": "overlay",
                }
            },
        }
        for number, one in enumerate(series)
    ]
    layout = {
        "height": 90 + len(order) * (12 + 12 * len(series)) + (30 if len(series) > 1 else 0),
        "barmode": "group",
        "bargap": 0.25,
        "showlegend": len(series) > 1,
        "xaxis": {"title": {"text": f"{axis} ({word})" if word else axis}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "type": "category", "showgrid": False, "ticksuffix": " ",
                  **_every(ticks)},
    }  # fmt: skip
    rows = [[labels[i], *(shown(one.y[i], unit) for one in series)] for i in order]
    text = "; ".join(
        f"{one.name + ': ' if len(series) > 1 else ''}lowest {shown(low, unit)} ({labels[where]}), highest "
        f"{shown(high, unit)} ({labels[other]})"
        for one in series
        for low, where, high, other in _extremes(one.y)
    )
    return Chart(name, title, f"{text}.", data, layout, Table(["", *(one.name for one in series)], rows), note)


def heat(
    name: str,
    title: str,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    counts: Sequence[Sequence[int]],
    *,
    row: str,
    column: str,
    text: str,
    note: str = "",
) -> Chart:
    """A heat map of shares, with the counts behind them in its hover texts and its table.

    Args:
        name, title, text, note: see `fedkern.report.html_page.Chart`.
        values: shares in per cent, by row and column.
        rows, columns: names.
        counts: numbers of images, by row and column.
        row, column: what rows and columns are.
    """
    written = len(rows) <= CELL_ROWS and len(columns) <= CELL_COLUMNS
    upright, across = (_apart([_literal(one) for one in names]) for names in (rows, columns))
    top = max((float(value) for line in values for value in line), default=0.0)
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": [[_number(value) for value in line] for line in values],
        "x": across,
        "y": upright,
        "customdata": [[int(count) for count in line] for line in counts],
        "hovertemplate": f"{row} %{{y}}<br>{column} %{{x}}<br>%{{customdata}} images, %{{z:.1f}} %<extra></extra>",
        "zmin": 0,
        "zmax": 100 if top > 50 else max(top, 1.0),
        "xgap": 1,
        "ygap": 1,
        "meta": {"scale": True},
        "colorbar": {"ticksuffix": " %", "thickness": 10, "len": 0.9},
    }
    if written:
        trace |= {"texttemplate": "%{z:.0f}", "showscale": False}
    layout = {
        "height": min(120 + (26 if written else 14) * len(rows) + 6 * max(map(len, across), default=0), 900),
        "xaxis": {"title": {"text": column}, "type": "category", "showgrid": False, **_every(across)},
        "yaxis": {"title": {"text": row}, "type": "category", "showgrid": False, "autorange": "reversed",
                  "ticksuffix": " ", **_every(upright)},
    }  # fmt: skip
    places = evenly(len(columns), 20)
    body = [[rows[i], *(f"{int(counts[i][j]):,}" for j in places)] for i in evenly(len(rows), ROWS)]
    parts = [f"{len(body)} of {len(rows)} rows" * (len(body) < len(rows)),
             f"{len(places)} of {len(columns)} columns" * (len(places) < len(columns))]  # fmt: skip
    caption = "; ".join(["number of images", *filter(None, parts)])
    table = Table([f"{row} \\ {column}", *(columns[j] for j in places)], body, caption)
    note = " ".join(filter(None, [note, "The numbers are per cent of the row." if written else ""]))
    return Chart(name, title, text, [trace], layout, table, note)


def dots(
    name: str, title: str, groups: Sequence[tuple[str, Sequence[float], float, float | None]], *, axis: str,
    note: str = "",
) -> Chart:  # fmt: skip
    """A dot for every run, and the mean of every group with a bar of one standard deviation.

    Args:
        name, title, note: see `fedkern.report.html_page.Chart`.
        groups: name, values of the runs, their mean, and their standard deviation or None; in per cent.
        axis: title of the horizontal axis.
    """
    ticks = _apart([_literal(group, 40) for group, *_ in groups])
    data: list[dict[str, Any]] = []
    for number, (tick, (_, values, mean, deviation)) in enumerate(zip(ticks, groups, strict=True)):
        common = {"type": "scatter", "mode": "markers", "showlegend": False, "meta": {"slot": number % SLOTS}}
        data.append({**common, "x": [_number(value) for value in values], "y": [tick] * len(values),
                     "hovertemplate": "%{x:.1f} %<extra>a run of %{y}</extra>",
                     "marker": {"size": 9, "symbol": "circle-open", "opacity": 0.9}})  # fmt: skip
        spread = {} if deviation is None else {"error_x": {"type": "data", "array": [_number(deviation)], "width": 6}}
        data.append({**common, "x": [_number(mean)], "y": [tick], **spread,
                     "hovertemplate": "mean %{x:.1f} %<extra>%{y}</extra>",
                     "marker": {"size": 12, "symbol": SYMBOLS[number % len(SYMBOLS)]}})  # fmt: skip
    layout = {
        "height": 110 + 44 * len(groups),
        "xaxis": {"title": {"text": f"{axis} (%)"}},
        "yaxis": {"type": "category", "range": [len(groups) - 0.5, -0.5], "ticksuffix": " ", **_every(ticks)},
    }
    rows = [
        [group, ", ".join(shown(value, "%") for value in values), shown(mean, "%"), shown(deviation, "%")]
        for group, values, mean, deviation in groups
    ]
    text = "; ".join(f"{row[0]}: mean {row[2]}, runs {row[1]}" for row in rows)
    return Chart(name, title, f"{text}.", data, layout, Table(["", "runs", "mean", "standard deviation"], rows), note)


def _number(value: float | None) -> float | None:
    """A number for JSON, of six digits; None unless it is finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.6g}")


def _scaled_value(value: float | None, scale: float) -> float | None:
    return None if value is None else _number(value / scale)


def _scaled(series: Sequence[Series], unit: str) -> tuple[float, str]:
    """What values are divided by, and the unit of the axis."""
    top = max((abs(v) for one in series for v in one.y if _number(v) is not None and v is not None), default=0.0)
    if unit == "B":
        for size, word in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if top >= size:
                return size, word
        return 1.0, "B"
    if unit == "s":
        return (3600.0, "h") if top >= 3 * 3600 else (60.0, "min") if top >= 180 else (1.0, "s")
    return 1.0, unit if unit == "%" else ""


def _told(series: Sequence[Series], unit: str) -> str:
    parts = []
    for one in series[:TOLD]:
        known = [(x, y) for x, y in zip(one.x, one.y, strict=True) if _number(y) is not None]
        if not known:
            continue
        (first, begin), (last, end) = known[0], known[-1]
        so = f"{shown(begin, unit)} in round {first}"
        parts.append(f"{one.name}: {so}" + (f", {shown(end, unit)} in round {last}" if last != first else ""))
    more = f"; and {len(series) - TOLD} more" if len(series) > TOLD else ""
    return f"{'; '.join(parts)}{more}."


def _extremes(values: Sequence[float | None]) -> list[tuple[float, int, float, int]]:
    known = [(value, i) for i, value in enumerate(values) if value is not None and math.isfinite(value)]
    if not known:
        return []
    low, high = min(known), max(known, key=lambda pair: (pair[0], -pair[1]))
    return [(*low, *high)]


def _whole(values: Sequence[int]) -> dict[str, Any]:
    """Ticks of an axis at whole numbers only."""
    low, high = (min(values), max(values)) if values else (0, 1)
    few = {"dtick": 1} if high - low <= 10 else {"nticks": 10}
    return {**few, "range": [low - 0.5, high + 0.5], "tickformat": "d"}


def _every(names: Sequence[str]) -> dict[str, Any]:
    """Ticks of an axis of categories: all of them up to 40, else every so many."""
    step = -(-len(names) // 40)
    return {"tickmode": "array", "tickvals": list(names[::step]), "ticktext": list(names[::step])}


def _literal(name: str, most: int = TICK) -> str:
    """A name for plotly, which reads ``<b>`` in texts as markup."""
    return label(name, most).replace("&", "&amp;").replace("<", "&lt;")


def _apart(names: Sequence[str]) -> list[str]:
    """Names that differ: plotly would draw equal categories over one another."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
