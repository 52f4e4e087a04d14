"""Curves over the rounds, a clock or uploaded bytes, of a run or as means of a comparison's seeds."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, product
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedkern.listeners.events import Record
from fedkern.report.figures import plots
from fedkern.report.names import TITLE, entry, label
from fedkern.report.tables import in_unit
from fedkern.tasks.figure_names import scale, set_title, short_title, split_metric

DASHES = ("-", "--", "-.", ":")
SOFT, THIN = (plots.GREY, "--", ""), (plots.GREY, "-", "")
"""Looks of a curve that is no result, and of one among many."""
_SETS = {
    "id": (plots.BLUE, "-", "o"), "ood": (plots.ORANGE, "-", "s"), "": (plots.BLUE, "-", "o"),
    "minority": (plots.PINK, "-", "D"), "unseen": (plots.GREEN, "-", "^"), "held_out": (plots.ORANGE, "-", "v"),
    "validation": SOFT,
}  # fmt: skip
"""Looks of the curves of known test sets, in their order."""
NAMED, LEGEND = 24, 40
"""Most curves in a panel's legend, and longest name there, in characters."""

AXES = {
    "": ("the rounds", "communication round", ""),
    "simulated_seconds": ("simulated time", "simulated time", "s"),
    "bytes_up": ("uploaded bytes", "uploaded by all clients", "B"),
    "clock": ("the virtual clock", "virtual clock: local steps of a client of usual speed", ""),
}
"""Names, titles and units of horizontal axes, by the records' entry with the places of the rounds."""
CLIENTS = 12
"""Most clients with a curve each. Of more clients the lowest, the middle and the highest value are drawn."""
SPREAD: Mapping[str, Callable[[list[float]], float]] = {"highest": max, "middle": median, "lowest": min}
WEIGHTS = {"weight": "client weight", "own_loss": "loss on held-out samples"}

Points = tuple[list[int], list[float]]
"""Rounds and values of a curve."""


@dataclass(frozen=True)
class Curve:
    """A curve, with gaps at values that are None or not finite.

    Attributes:
        look: colour, dashes and marker (None: by the curve's number in the panel).
        at: places of the rounds on the panel's horizontal axis (None: the rounds).
        deviation: half the height of a band around every value.
    """

    name: str
    rounds: Sequence[int]
    values: Sequence[float | None]
    look: tuple[str, str, str] | None = None
    at: Sequence[float] | None = None
    deviation: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """Axes of curves.

    Attributes:
        axis: title of the vertical axis, in one line or two.
        unit: see :func:`fedkern.report.tables.in_unit`.
        zero: begin the axis at 0, which would flatten a loss that stays far above.
        ends: write the last value at the end of every curve.
        levels: heights of dotted lines, with their colours.
        summary: curves of the text and the table, if many are drawn.
        along: the horizontal axis, a key of `AXES`.
    """

    axis: str
    curves: Sequence[Curve]
    unit: str = ""
    zero: bool = True
    ends: bool = False
    levels: Mapping[float, str] = field(default_factory=dict)
    level_name: str = ""
    summary: Sequence[Curve] = ()
    along: str = ""


def look(number: int) -> tuple[str, str, str]:
    colours, markers = len(plots.COLOURS), len(plots.MARKERS)
    return plots.COLOURS[number % colours], DASHES[number // colours % len(DASHES)], plots.MARKERS[number % markers]


def by_name(points: Iterable[tuple[str, int, object]], factor: float = 1) -> dict[str, Points]:
    """Return rounds and values, times a factor, by curve name. Values that are no numbers are left out."""
    curves: dict[str, Points] = {}
    for name, at, value in points:
        if isinstance(value, (int, float)):
            rounds, values = curves.setdefault(name, ([], []))
            rounds.append(int(at))
            values.append(factor * float(value))
    return curves


# -- the panels of a run -----------------------------------------------------------------------------------------------


def set_curves(points: Mapping[str, Points]) -> dict[str, Curve]:
    user_sets = [name for name in points if name not in _SETS]
    looks = _SETS | {name: look(2 + number) for number, name in enumerate(user_sets)}
    return {name: Curve(set_title(name) or "test", *points[name], looks[name]) for name in looks if name in points}


def accuracy_panels(
    records: Sequence[Record], main: str, *, tests: Collection[str] = (), chance: Mapping[str, float] | None = None
) -> list[Panel]:
    """Return the main figure on every test set over the run's axes (:func:`axes_of`).

    Recall depends on the number of candidates, so sets with other numbers have their own panel. ``chance``: see
    :func:`fedkern.report.run_contents.constant_figures`.
    """
    (factor, unit), entries = scale(main), [(r["round"], *item) for r in records for item in r.items()]
    split = [(*split_metric(name, tests), at, value) for at, name, value in entries]
    points = by_name(((name, at, value) for name, figure, at, value in split if figure == main), factor)
    sizes = {name: values[-1] for name, (_, values) in by_name(
        (name, at, value) for name, figure, at, value in split if figure == "gallery"
    ).items()}  # fmt: skip
    panels: dict[float, dict[str, Curve]] = {}  # curves by number of candidates
    for name, curve in set_curves(points).items():
        panels.setdefault(sizes.get(name, 0.0), {})[name] = curve
    by_size = [
        Panel(
            short_title(main) + (f"\namong {size:,.0f} candidates" if size else ""), [*curves.values()], unit,
            ends=True, **levels(main, [(chance or {}).get(f"{name}_{main}" if name else main) for name in curves]),
        )
        for size, curves in panels.items()
    ]  # fmt: skip
    return [panel for name in axes_of([records]) for panel in over_axis(records, by_size, name)]


def levels(figure: str, values: Iterable[float | None]) -> dict[str, Any]:
    """Return arguments of a panel for dotted lines at distinct figures of constant predictions."""
    factor, unit = scale(figure)
    lines = {round(factor * value, 1 if unit else 3): plots.GREY for value in values if value is not None}
    names = {"accuracy": "commonest class", "dice": "one class everywhere"}
    return {"levels": lines, "level_name": names.get(figure, "chance")}


def client_panels(records: Sequence[Record], main: str) -> list[Panel]:
    """Draw the main figure of the mean and the worst client on their own test sets, over curves of single clients."""
    factor, unit = scale(main)
    curves = by_name(
        ((f"{statistic} client", r["round"], r.get(f"{statistic}_client_{main}")) for statistic in ("mean", "worst")
         for r in records), factor,
    )  # fmt: skip
    singles = by_name(
        ((k, r["round"], figures.get(main)) for r in records for k, figures in r.get("client_metrics", {}).items()),
        factor,
    )
    all_curves = [*thin_curves(singles), *(Curve(name, *points) for name, points in curves.items())]
    axis = f"{short_title(main)}\non the clients' own test sets"
    return over_clock(records, [Panel(axis, all_curves, unit, ends=True)]) if curves else []


def thin_curves(points: Mapping[str, Points]) -> list[Curve]:
    """Return thin curves of at most `DRAWN` clients, the first of which names all."""
    drawn_points = list(points.values())[:: -(-len(points) // plots.DRAWN) or 1]
    name = "single clients" if len(drawn_points) == len(points) else f"{len(drawn_points)} of {len(points):,} clients"
    return [Curve("" if number else name, *client_points, THIN) for number, client_points in enumerate(drawn_points)]


def client_curves(records: Sequence[Record], key: str) -> list[Curve]:
    """Return a figure's curve for every client, of many clients only the highest, middle and lowest ones."""
    points = _points(records, key)
    if len(points) <= CLIENTS:
        names = _names(records)
        return [Curve(names[k], *points[k]) for k in sorted(points, key=int)]
    values: dict[int, list[float]] = {}
    for rounds, curve in points.values():
        for at, value in zip(rounds, curve, strict=True):
            values.setdefault(at, []).append(value)
    rounds_told = sorted(values)
    return [Curve(name, rounds_told, [pick(values[at]) for at in rounds_told]) for name, pick in SPREAD.items()]


def weight_panels(records: Sequence[Record], *, by_samples: bool = False) -> list[Panel]:
    """Draw every client's weight, and its loss on held-out samples, over the rounds.

    Dotted lines are the initial weights: the shares of the samples if ``by_samples``, otherwise equal. Of more than
    `CLIENTS` clients only the heaviest one stands out.
    """
    weights = _points(records, "weight")
    if not weights:
        return []
    clients = sorted(weights, key=int)
    heaviest = max(clients, key=lambda client: weights[client][1][-1])
    has_few_clients = len(clients) <= CLIENTS
    looks = {k: look(i) for i, k in enumerate(clients)} if has_few_clients else {heaviest: (plots.ORANGE, "-", "o")}
    names, panels = _names(records), []
    for key, axis in WEIGHTS.items():
        points = _points(records, key)
        curves = [] if has_few_clients else thin_curves({k: points[k] for k in clients if k in points})
        curves += [Curve(names[k], *points[k], looks[k]) for k in looks if k in points]
        levels, name = {}, ""
        if key == "weight" and by_samples:
            shares = _shares(records)
            levels = {shares[k]: colour for k, (colour, _, _) in looks.items()}
            curves.append(Curve("share of the samples", [], [], (plots.GREY, ":", "")))  # the name of all these lines
        elif key == "weight":
            levels, name = {1 / len(clients): plots.GREY}, "equal weights"
        summary = [] if has_few_clients else client_curves(records, key)
        if points:
            panels.append(Panel(axis, curves, "", key == "weight", False, levels, name, summary))
    return over_clock(records, panels)


def _points(records: Sequence[Record], key: str) -> dict[str, Points]:
    return by_name((k, r["round"], info.get(key)) for r in records for k, info in r.get("clients", {}).items())


def _names(records: Sequence[Record]) -> dict[str, str]:
    names = {k: info.get("name") for r in records for k, info in r.get("clients", {}).items()}
    return {k: f"client {k}" if name is None else str(name) for k, name in names.items()}


def _shares(records: Sequence[Record]) -> dict[str, float]:
    """Return every client's share of all samples, including samples of clients that never took part.

    In the first record the weights still are these shares, so samples over weights gives the sum of all samples.
    """
    weighted = [{k: info for k, info in r.get("clients", {}).items() if "weight" in info} for r in records]
    begun = next(clients for clients in weighted if clients).values()
    total = sum(info["samples"] for info in begun) / sum(info["weight"] for info in begun)
    return {client: info["samples"] / total for clients in weighted for client, info in clients.items()}


def axes_of(histories: Iterable[Sequence[Record]]) -> list[str]:
    """Return the horizontal axes of curves of some runs, keys of `AXES`, the first for all curves.

    These are simulated time and bytes if all records have them, the virtual clock if some runs are asynchronous and all
    records have it, otherwise the rounds.
    """
    records = [record for history in histories for record in history if record["round"] > 0]
    if records and all("simulated_seconds" in record for record in records):
        return ["simulated_seconds", "bytes_up"]
    is_stale = any("staleness" in record for record in records)
    return ["clock" if is_stale and all("clock" in record for record in records) else ""]


def over_axis(records: Sequence[Record], panels: Sequence[Panel], name: str) -> list[Panel]:
    """Move the curves of a run from the rounds to an axis, a key of `AXES`."""
    if not name:
        return [*panels]
    places = {int(record["round"]): float(record[name]) for record in records if name in record}

    def move(curve: Curve) -> Curve:
        return replace(curve, at=[places.get(number, 0.0) for number in curve.rounds])  # set-up rounds take no time

    return [replace(panel, along=name, curves=[*map(move, panel.curves)]) for panel in panels]


def over_clock(records: Sequence[Record], panels: Sequence[Panel]) -> list[Panel]:
    """Move the curves of a run to its first axis."""
    return over_axis(records, panels, axes_of([records])[0])


# -- the drawing -------------------------------------------------------------------------------------------------------


def draw_panels(panels: Sequence[Panel], *, title: str = "", stacked: bool = False, page: bool = False) -> Figure:
    """Draw at least one panel, side by side or ``stacked`` for a file, or for a ``page``, which has the title."""
    down, across = (len(panels), 1) if page or stacked else (1, len(panels))
    wide = plots.PAGE if page else 7.2 if across == 1 else 5.4 * across
    figure = plots.new_figure(wide, 0.7 + 2.7 * down if page else 1.2 + 3.0 * down)
    rows = figure.subplots(down, across, squeeze=False)
    curves = [curve for panel in panels for curve in panel.curves]
    for axes, panel in zip(rows.flat, panels, strict=True):
        _draw_panel(axes, panel, 2.2 if page else 3.4)
        alike = [peer for peer in panels if (peer.unit, peer.zero) == (panel.unit, panel.zero)]
        low, _ = axes.dataLim.intervaly
        if low >= 0 and (panel.zero or axes.get_ylim()[0] < 0):
            axes.set_ylim(0, _highest(alike))
        if panel.ends:
            _write_ends(axes, panel)
        _scale_along(axes, panel.along, [peer for peer in panels if peer.along == panel.along])
        plots.add_frame(axes)
    for axes, panel in zip(rows[:-1].flat, panels, strict=False):
        if panel.along == panels[-1].along:
            axes.set_xlabel("")
    banded = any(curve.deviation is not None for curve in curves)
    plots.add_title(figure, title, "mean and standard deviation over seeds" if banded else "")
    plots.legend_below(figure)
    return figure


def _scale_along(axes: Axes, along: str, panels: Sequence[Panel]) -> None:
    curves = [curve for panel in panels for curve in panel.curves]
    places = [float(x) for curve in curves for x in (curve.rounds if curve.at is None else curve.at)]
    start, end, (_, title, unit) = min(places), max(places), AXES[along]
    axes.set_xlabel(title, fontsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(8 if not unit else 5) if along else plots.whole_numbers())
    axes.set_xlim(*((start - 0.02 * end, 1.02 * end) if along else (start - 0.5, end + 0.5)))
    if unit:
        axes.xaxis.set_major_formatter(lambda value, _: in_unit(value, unit))


def _draw_panel(axes: Axes, panel: Panel, room: float) -> None:
    numbers, names = count(), count()
    for curve in panel.curves:
        colour, dashes, marker = curve.look or look(next(numbers))
        x = curve.rounds if curve.at is None else curve.at
        y, thin = np.array(curve.values, dtype=np.float64), curve.look is THIN
        axes.plot(
            x, y, dashes, color=colour, marker=marker, markevery=max(1, len(x) // 12), ms=5, lw=0.8 if thin else 2,
            alpha=0.6 if thin else 1.0, label=entry(curve.name, LEGEND) if curve.name and next(names) < NAMED else "",
        )  # fmt: skip
        if curve.deviation is not None:
            band = np.array(curve.deviation)
            axes.fill_between(x, y - band, y + band, color=colour, alpha=0.18, lw=0)
            if len(x) == 1:  # a band over one round has no width
                axes.errorbar(x, y, band, color=colour, capsize=4, lw=1.5)
    for number, (height, colour) in enumerate(panel.levels.items()):
        axes.axhline(height, color=colour, lw=1.5, ls=":", label="" if number else panel.level_name)
    axis = f"{panel.axis} (%)" if panel.unit == "%" else panel.axis
    lines = [plots.wrap_text(label(line, TITLE), 12, room) for line in axis.split("\n")]
    axes.set_ylabel("\n".join(lines), fontsize=12)
    if panel.unit in ("B", "s"):
        axes.yaxis.set_major_formatter(lambda value, _: in_unit(value, panel.unit))


def _write_ends(axes: Axes, panel: Panel) -> None:
    """Write each curve's last value beside its end, moved down if it would cover the value above."""
    lines = zip(axes.get_lines(), panel.curves, strict=False)
    ends = [(curve.values[-1], line.get_color()) for line, curve in lines if curve.look not in (SOFT, THIN)]
    top = axes.get_ylim()[1]
    at = 2 * top
    for value, colour in sorted(
        ((value, colour) for value, colour in ends if value is not None and math.isfinite(value)), reverse=True
    ):
        at = min(value, at - top / 20)
        axes.annotate(
            f"{value:{'.1f' if panel.unit else '.3g'}}", (1, at), (6, 0), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", color=colour, fontsize=12, fontweight="bold", va="center",
            annotation_clip=False,
        )  # fmt: skip


def _highest(panels: Sequence[Panel]) -> float:
    """Return the upper end of the vertical axes, which leaves room above the values."""
    heights = [value for panel in panels for curve in panel.curves for value in curve.values if value is not None]
    heights = [*filter(math.isfinite, heights), *(height for panel in panels for height in panel.levels)]
    highest = max(heights, default=0.0)
    if panels[0].unit == "%":
        return 1.02 * next((end for end in (5, 10, 20, 50) if highest < 0.9 * end), 100)
    return 1.1 * highest or 1.0


Groups = Mapping[str, Sequence[Sequence[Record]]]
"""Round records of every run, by group name."""


def mean_curve(runs: Sequence[Sequence[Record]], figure: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounds, int64 ``[n]``, that all runs with the figure share, and the values, fp64 ``[runs, n]``."""
    all_tables = [
        {int(r["round"]): float(r[figure]) for r in records if isinstance(r.get(figure), (int, float))}
        for records in runs
    ]
    tables = [table for table in all_tables if table]
    rounds = sorted(set.intersection(*map(set, tables))) if tables else []
    values = [[table[r] for r in rounds] for table in tables]
    return np.array(rounds, dtype=np.int64), np.array(values, dtype=np.float64).reshape(len(tables), len(rounds))


def describe_axes(panels: Sequence[Panel]) -> str:
    return " and ".join(AXES[panel.along][0] for panel in panels)


def comparison_panels(
    groups: Groups, figures: Sequence[str], *, chance: Mapping[str, float] | None = None
) -> dict[str, list[Panel]]:
    """Return panels for every main figure, with a curve for each group and one standard deviation as its band.

    A figure has a panel for each of the runs' axes (:func:`axes_of`).
    ``chance``: see :func:`fedkern.report.run_contents.constant_figures`.
    """
    names = axes_of(records for runs in groups.values() for records in runs)
    panels: dict[str, list[Panel]] = {}
    for figure, along in product(figures, names):
        (test_set, name), (factor, unit), curves = split_metric(figure), scale(figure), []
        for number, (group, runs) in enumerate(groups.items()):
            rounds, values = mean_curve(runs, figure)
            if len(rounds):
                ends, places = mean_curve(runs, along)
                at = np.interp(rounds, ends, places.mean(0)).tolist() if along else None
                band = factor * values.std(0, ddof=1) if len(values) > 1 else None
                mean = (factor * values.mean(0)).tolist()
                curves.append(Curve(group, rounds.tolist(), mean, look(number), at=at, deviation=band))
        if curves:
            axis = f"{short_title(name)}{f', {set_title(test_set)}' if test_set else ''}"
            lines = levels(name, [(chance or {}).get(figure)])
            panels.setdefault(figure, []).append(Panel(axis, curves, unit, zero=False, along=along, **lines))
    return panels
