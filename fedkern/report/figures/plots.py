"""Accuracy (or Dice) curves and the partition as figures, and figures as PNG files and as SVG of a page.

Figures use matplotlib's object interface: no display, and no global state outside of :func:`save` and :func:`svg`.  The
colours are those of Okabe and Ito, which are safe for colour-blind readers.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

from fedkern.files import atomic
from fedkern.report.figures import png
from fedkern.report.figures.fitting import fitted, width
from fedkern.report.names import TITLE, entry, label
from fedkern.tasks.figure_names import scale, short_title, split_metric

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
GRID = "#dddddd"
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", "#000000", GREY)
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^v*PX"
_ON_PAGE = {"#000000": "currentColor", GRID: "var(--line)", GREY: "var(--soft)", BLUE.lower(): "var(--blue)"}
"""Colours that a page in dark mode changes, and what stands for them in an SVG (``templates/report.css``)."""
_STYLES = {
    "id": (BLUE, "-", "o", "in distribution"),
    "ood": (ORANGE, "-", "s", "out of distribution"),
    "": (BLUE, "-", "o", "test"),
    "minority": (PINK, "-", "D", "minority"),
    "unseen": (GREEN, "-", "^", "unseen client"),
    "held_out": (ORANGE, "-", "v", "held-out client"),
    "validation": (GREY, "--", "", "validation"),
}

NARROW, LOW = 0.72, 0.8
"""Width and height of a figure of curves on a page, as shares of those of its PNG, which leaves more room."""
DRAWN = 200
"""Most clients in the picture of a partition; rows of more could not be told apart."""

Points = tuple[list[int], list[float]]
"""Rounds and values of a curve."""


@contextmanager
def _literal_texts(figure: Figure) -> Iterator[None]:
    """Drawing with literal texts, as a class may have ``$`` in its name, and a box for a character the font lacks."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_usetex(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        yield


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG completely or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    canvas = FigureCanvasAgg(figure)
    # Letters of 20 and more dots need no hints, which take a third of the time that texts take.
    with _literal_texts(figure), rc_context({"text.hinting": "none"}):
        canvas.draw()
    size = canvas.get_width_height()
    image = Image.frombuffer("RGBA", size, canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
    atomic.write_bytes(path, png.encoded(np.asarray(image.convert("RGB")), figure.dpi))  # the ground is opaque


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element of an HTML page, on the page's ground and in its font; equal figures give equal texts.

    The grounds of the figure and its axes are taken away.  All ids inside begin with ``name``, one of a kind on a page.
    """
    figure.set_facecolor("none")
    for axes in figure.axes:
        axes.set_facecolor("none")
    file = io.StringIO()
    # Texts stay texts: the reader's fonts know more scripts than matplotlib's, and paths of letters are large.
    how: Any = {"svg.fonttype": "none", "svg.hashsalt": "fedkern", "font.sans-serif": ["DejaVu Sans"]}
    with _literal_texts(figure), rc_context(how):
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = re.sub(r"<defs>\s*<style.*?</defs>\s*", "", file.getvalue(), count=1, flags=re.DOTALL)
    size = f'style="--wide: {96 * figure.get_figwidth():.0f}px"'
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text[text.index("<svg") :], count=2)
    text = text.replace("<svg", f"<svg {size}", 1)

    def of_page(tag: re.Match[str]) -> str:
        found = tag[0]
        for colour, here in _ON_PAGE.items():
            found = found.replace(colour, here)
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", found)

    return re.sub(r"<[^>]+>", of_page, text).strip()


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, at 150 dots per inch, so that texts stay readable at half size."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def entitle(figure: Figure, text: str) -> None:
    """Gives the first axes of a figure a title, in as many lines as the figure's width asks for."""
    figure.axes[0].set_title(fitted(label(text, TITLE), 13, figure.get_figwidth() - 1.0), fontsize=13, loc="left")


def legend_below(figure: Figure, narrow: float = NARROW, low: float = LOW) -> None:
    """Names all curves of a figure under its axes, where the names cover no curve, and makes room for the names.

    ``narrow`` and ``low`` are the shares of the figure's width and height that are left on a page.
    """
    named = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {text: handle for each in named for handle, text in zip(*each, strict=True)}
    if not handles:
        return
    room = narrow * figure.get_figwidth() // (max(width(text, 10) for text in handles) + 0.65)
    columns = int(min(max(room, 1), len(handles), 4))
    rows = -(-len(handles) // columns)
    columns = -(-len(handles) // rows)  # rows of nearly equal length
    figure.set_figheight(figure.get_figheight() + 0.21 * rows / low)
    figure.legend(
        [*handles.values()], [*handles], fontsize=10, frameon=False, ncols=columns, loc="outside lower center"
    )


def ink(share: float) -> str:
    """Colour of a number on the colour of "Blues" at ``share`` of its scale."""
    return "white" if share > 0.65 else "#222222"


def whole() -> MaxNLocator:
    """A locator of ticks at whole numbers only, even on a short axis."""
    return MaxNLocator(integer=True, min_n_ticks=1)


def frame(axes: Axes) -> None:
    """Gives axes their grid, and leaves out the upper and the right edge."""
    axes.tick_params(labelsize=11)
    axes.grid(True, color=GRID, lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def from_zero(axes: Axes, always: bool) -> None:
    """Lets the vertical axis begin at 0 ``always``, or only where it would begin below without a value below."""
    low, high = axes.dataLim.intervaly
    if low >= 0 and (always or axes.get_ylim()[0] < 0):
        axes.set_ylim(0, 1.05 * high if high > 0 else 1)


def over_rounds(axes: Axes) -> None:
    """Gives axes of curves over the communication rounds their frame and their horizontal axis."""
    axes.set_xlabel("communication round", fontsize=12)
    axes.xaxis.set_major_locator(whole())
    frame(axes)


def over_clock(axes: Axes, first: float, last: float) -> None:
    """Gives axes of curves from ``first`` to ``last`` on the virtual clock their horizontal axis."""
    axes.set_xlabel("virtual clock: local steps of a client of usual speed", fontsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.set_xlim(first - 0.02 * last, 1.02 * last)


def clock_of(records: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """When every round of an asynchronous run was over on the virtual clock; empty for a run of synchronous rounds."""
    return {int(record["round"]): float(record["clock"]) for record in records if "staleness" in record}


def add_point(curves: dict[str, Points], name: str, at: int, value: float) -> None:
    """Adds the value of a round to the curve of a name."""
    rounds, values = curves.setdefault(name, ([], []))
    rounds.append(int(at))
    values.append(float(value))


def main_points(
    records: Iterable[Mapping[str, Any]], main: str, tests: Collection[str]
) -> tuple[dict[str, Points], dict[str, float]]:
    """Rounds and main figures, shares in per cent, by test set; and the sets' numbers of candidates in retrieval."""
    curves: dict[str, Points] = {}
    galleries: dict[str, float] = {}
    for record in records:
        for name, value in record.items():
            test_set, figure = split_metric(name, tests)
            if figure == main and isinstance(value, (int, float)):
                add_point(curves, test_set, record["round"], scale(main)[0] * float(value))
            elif figure == "gallery" and isinstance(value, (int, float)):
                galleries[test_set] = float(value)
    return curves, galleries


def accuracy_curves(
    records: Sequence[Mapping[str, Any]],
    main: str,
    *,
    title: str = "",
    tests: Collection[str] = (),
    chance: Mapping[str, float] | None = None,
    stacked: bool = False,
) -> Figure | None:
    """Draws the main figure on every test set over the communication rounds, or over the clock of asynchronous ones.

    Recall depends on the number of candidates: sets with other numbers have axes of their own, which say the number.

    Args:
        records: lines of ``metrics.jsonl``; lines without such a figure are skipped.
        main: the figure's name.
        chance: see :func:`fedkern.report.chance.constants`.
        stacked: put axes of other numbers of candidates below each other, for a narrow page, rather than side by side.

    Returns:
        None if there was nothing to draw.
    """
    (curves, galleries), unit, lines = main_points(records, main, tests), scale(main)[1], chance or {}
    if not curves:
        return None
    panels: dict[float, list[str]] = {}  # test sets by number of candidates
    for name in sorted(curves, key=lambda name: list(_STYLES).index(name) if name in _STYLES else len(_STYLES)):
        panels.setdefault(galleries.get(name, 0.0), []).append(name)
    down, across = (len(panels), 1) if stacked else (1, len(panels))
    figure = new_figure(7.2 if across == 1 else 5.4 * across, 4.2 * down)
    spans = [rounds for rounds, _ in curves.values()]
    first, last = min(rounds[0] for rounds in spans), max(rounds[-1] for rounds in spans)
    clock, level = clock_of(records), [] if unit else [*lines.values()]
    top = highest([*level, *(value for _, values in curves.values() for value in values)], unit)
    for axes, (gallery, names) in zip(figure.subplots(down, across, squeeze=False).flat, panels.items(), strict=True):
        drawn = {name: curves[name] for name in names}
        _curves(axes, {name: ([clock.get(at, at) for at in x], y) for name, (x, y) in drawn.items()}, top, unit)
        chance_lines(axes, main, [lines.get(f"{name}_{main}" if name else main) for name in names])
        among = f"\namong {gallery:,.0f} candidates" if gallery else ""
        axes.set_ylabel(f"{short_title(main)}{among}" + f" ({unit})" * bool(unit), fontsize=12)
        if clock:
            over_clock(axes, clock[first], clock[last])
        else:
            axes.set_xlim(first - 0.5, last + 0.5)
    entitle(figure, title)
    legend_below(figure)
    return figure


def client_points(records: Sequence[Mapping[str, Any]], main: str) -> dict[str, Points]:
    """Rounds and main figures, shares in per cent, of the mean and the worst client on their own test sets.

    Empty where the records have no such figure, such as those of clients without test sets.
    """
    found: dict[str, Points] = {}
    for which in ("mean", "worst"):
        for record in records:
            if isinstance(value := record.get(f"{which}_client_{main}"), (int, float)):
                add_point(found, f"{which} client", record["round"], scale(main)[0] * float(value))
    return found


def clients_picture(records: Sequence[Mapping[str, Any]], main: str, *, title: str = "") -> Figure | None:
    """Draws :func:`client_points` over thin curves of at most `DRAWN` single clients; None if there are none."""
    curves, (factor, unit) = client_points(records, main), scale(main)
    if not curves:
        return None
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    rounds = [at for points, _ in curves.values() for at in points]
    each: dict[str, Points] = {}
    for record in records:
        for k, figures in record.get("client_metrics", {}).items():
            if main in figures:
                add_point(each, k, record["round"], factor * float(figures[main]))
    for number, (points, values) in enumerate(list(each.values())[:: -(-len(each) // DRAWN) or 1]):
        axes.plot(points, values, color=GREY, lw=0.8, alpha=0.6, label="" if number else "single clients")
    top = highest((value for _, values in (*curves.values(), *each.values()) for value in values), unit)
    _curves(axes, curves, top, unit)
    axes.set_ylabel(f"{short_title(main)}\non the clients' own test sets" + f" ({unit})" * bool(unit), fontsize=12)
    axes.set_xlim(min(rounds) - 0.5, max(rounds) + 0.5)
    entitle(figure, title)
    legend_below(figure)
    return figure


def highest(values: Iterable[float], unit: str) -> float:
    """Upper end of an axis: above 100 %, or a round number where all are small; without unit above the values."""
    most = max(values, default=100)
    return 1.02 * next((end for end in (5, 10, 20, 50) if most < 0.9 * end), 100) if unit else 1.1 * most or 1.0


def chance_lines(axes: Axes, figure_name: str, values: Iterable[float | None]) -> None:
    """Draws dotted lines at figures that need no learning; equal ones once, None not at all."""
    factor, unit = scale(figure_name)
    known = dict.fromkeys(round(factor * value, 1 if unit else 3) for value in values if value is not None)
    for number, value in enumerate(known):
        text = {"accuracy": "commonest class", "dice": "one class everywhere"}.get(figure_name, "chance")
        axes.axhline(value, color=GREY, lw=1.5, ls=":", label="" if number else text)


def _curves(axes: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], top: float, unit: str) -> None:
    """Draws rounds and values of every test set up to ``top``, with the last value of each at its end."""
    ends = []
    others = [name for name in curves if name not in _STYLES]
    own = {name: (COLOURS[(2 + i) % len(COLOURS)], "-", MARKERS[(3 + i) % len(MARKERS)], name)
           for i, name in enumerate(others)}  # fmt: skip
    for name, (rounds, values) in curves.items():
        colour, dashes, marker, called = {**_STYLES, **own}[name]
        every = max(1, len(rounds) // 12)
        axes.plot(rounds, values, dashes, color=colour, marker=marker, markevery=every, ms=5, lw=2, label=entry(called))
        if name != "validation":
            ends.append((values[-1], colour))
    # Each curve's last value stands beside the curve's end, moved down if it would cover the value above.
    at = 2 * top
    for value, colour in sorted(ends, reverse=True):
        at = min(value, at - top / 20)
        axes.annotate(
            f"{value:{'.1f' if unit else '.3g'}}", (1, at), (6, 0), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", color=colour, fontsize=12, fontweight="bold", va="center",
            annotation_clip=False,
        )  # fmt: skip
    axes.set_ylim(0, top)
    over_rounds(axes)


def partition_picture(statistics: Any, *, title: str = "") -> Figure:
    """Draws how many training samples of each class every client holds, from ``PartitionStatistics``.

    Of more than `DRAWN` clients as many are drawn, evenly spaced by size (`PartitionStatistics.spread`).  Of a coloured
    data set a second panel has the background colour of every class of every client.
    """
    shown = statistics.spread(DRAWN)
    counts = np.asarray(statistics.counts)[shown]
    clients, classes = counts.shape
    every = len(statistics.counts)
    numbers = clients <= 20 and classes <= 20
    width = min(3.2 + 0.55 * classes, 14.0) if numbers else min(4.0 + 0.12 * classes, 14.0)
    height = min(1.9 + 0.42 * clients, 12.0) if numbers else min(2.5 + 0.06 * clients, 12.0)
    names = [label(name) for name in statistics.classes]
    room = max(len(name) for name in names) / 20 if classes <= 20 else 0.0  # for names at an angle
    beside = max(len(label(name)) for name in statistics.labels) / 14 if clients <= 20 and statistics.names else 0.0
    panels = 1 if statistics.colours is None else 2
    figure = new_figure(max(width, 5.0) + room + beside, panels * (max(height, 3.0) + room))
    axes, *below = figure.subplots(panels, 1, squeeze=False)[:, 0]
    top = max(int(counts.max(initial=0)), 1)
    image = axes.imshow(counts, cmap="Blues", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    if numbers:
        for k in range(clients):
            for c in range(classes):
                colour = ink(counts[k, c] / top) if counts[k, c] else "#aaaaaa"
                number = axes.text(c, k, str(counts[k, c]), ha="center", va="center", fontsize=10, color=colour)
                number.set_in_layout(False)  # numbers lie inside the axes, and measuring all of them takes time
    for panel in below:
        _colours(panel, statistics, shown)
    for panel in (axes, *below):
        if classes <= 20:
            long = max(len(name) for name in names) > 5
            turned: dict[str, Any] = {"rotation": 40, "rotation_mode": "anchor", "ha": "right"} if long else {}
            panel.set_xticks(range(classes), names, **turned)
        if clients <= 20:
            panel.set_yticks(range(clients), [label(name) for name in statistics.labels])
        panel.set_xlabel("class", fontsize=12)
        if clients < every:
            panel.set_yticks([])
            panel.set_ylabel(f"{clients} of {every:,} clients, largest first", fontsize=12)
        else:
            panel.set_ylabel("client", fontsize=12)
        panel.tick_params(labelsize=11, length=0 if numbers else 3)
        for spine in panel.spines.values():
            spine.set_visible(False)
    entitle(figure, title)
    bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=whole())
    bar.set_label("training samples", fontsize=12)
    bar.ax.tick_params(labelsize=11)
    return figure


def _colours(panel: Axes, statistics: Any, shown: npt.NDArray[np.int64]) -> None:
    """Draws the background colour of every class of every client; nothing where a client has no image of the class."""
    held = (np.asarray(statistics.counts)[shown] > 0)[..., None]
    colours = statistics.colours[shown]
    opaque = np.concatenate([colours, np.full_like(colours[..., :1], 255)], axis=2)
    panel.imshow(np.where(held, opaque, 0).astype(np.uint8), aspect="auto", interpolation="nearest")
    of = "the images" if statistics.tied == 1 else f"{100 * statistics.tied:.0f} % of the images, others random"
    panel.set_title(f"background colour of {of}", fontsize=13, loc="left")
