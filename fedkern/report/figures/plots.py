"""Pieces of figures, the pictures of a partition and of confusions, and figures as PNG files and as SVG of a page.

Figures use matplotlib's object interface: no display, and global state only in :func:`save_png` and :func:`to_svg`.
Colours are Okabe and Ito's, safe for colour-blind readers.

A confusion picture has the predicted classes of the images of every true class, for every test set.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D
from PIL import Image

from fedkern.engine.store.confusions import Confusions
from fedkern.files import atomic
from fedkern.report.names import TITLE, label
from fedkern.tasks.figure_names import set_title
from fedkern.tasks.partition_statistics import PartitionStatistics

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
GRID = "#dddddd"
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", "#000000", GREY)
MARKERS = "osD^v*PX"
_ON_PAGE = {"#000000": "currentColor", GRID: "var(--line)", GREY: "var(--soft)", BLUE.lower(): "var(--blue)"}
"""Colours that a page changes in dark mode, with their variables in ``templates/report.css``."""
PAGE = 5.2
"""Inches of a chart on a page: narrow enough to fit a phone with readable letters."""
DRAWN = 200
"""Most clients in the picture of a partition, beyond which rows are indistinguishable."""
_MISSING_LETTERS: set[str] = set()  # names of pictures with letters that no font has
_WARNED: set[str] = set()


@lru_cache(maxsize=64)
def _find_families(letters: str) -> tuple[list[str], bool]:
    """Return the default font family, those for its missing letters, and whether letters still lack a font."""
    families = [FontProperties().get_name()]
    usual = font_manager.get_font(findfont(FontProperties()))
    missing = {ord(letter) for letter in letters} - usual.get_charmap().keys()
    fonts = font_manager.fontManager.ttflist if missing else []
    for entry in [font for font in fonts if not font.name.startswith("Last Resort")]:  # whose letters are boxes
        with suppress(OSError, RuntimeError):  # a font that is gone or damaged
            if found := missing & font_manager.get_font(entry.fname).get_charmap().keys():
                families, missing = [*families, entry.name], missing - found
    return families, bool(missing)


def warn_of_missing_letters(warn: Callable[[str], object]) -> None:
    """Warn of saved pictures with boxes in place of letters, once in a process for pictures of one name."""
    names = sorted(_MISSING_LETTERS - _WARNED)
    _WARNED.update(_MISSING_LETTERS)
    _MISSING_LETTERS.clear()
    if names:
        warn(
            f"{', '.join(names)}: boxes stand for letters of names that no font here has. Install one, such as Noto "
            "Sans CJK or Noto Sans Devanagari, or write report.html, which has the reader's fonts."
        )


@contextmanager
def _literal_texts(figure: Figure) -> Iterator[None]:
    """Draw texts literally, as a class may have ``$`` in its name, and a box for a missing character."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_usetex(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        yield


def save_png(figure: Figure, path: Path) -> None:
    canvas = FigureCanvasAgg(figure)
    texts = figure.findobj(Text)
    letters = {letter for text in texts for letter in text.get_text() if letter.isprintable() and not letter.isspace()}
    families, lacking = _find_families("".join(sorted(letters)))
    _MISSING_LETTERS.update([path.name] if lacking else [])
    for text in texts if len(families) > 1 else ():
        text.set_fontfamily(families)
    # Letters of 20 and more dots need no hints, which take a third of the time that texts take.
    with _literal_texts(figure), rc_context({"text.hinting": "none"}):
        canvas.draw()
    size = canvas.get_width_height()
    image = Image.frombuffer("RGBA", size, canvas.buffer_rgba(), "raw", "RGBA", 0, 1).convert("RGB")  # it is opaque
    file = io.BytesIO()
    # Level 6, Pillow's own, takes twice as long for files that are a quarter smaller.
    image.save(file, "PNG", compress_level=1, dpi=(figure.dpi, figure.dpi))
    atomic.write_bytes(path, file.getvalue())


def to_svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG of an HTML page, on the page's ground and in its font. Equal figures give equal texts.

    All ids begin with ``name``, which is unique on a page.
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
        element = tag[0]
        for colour, css_colour in _ON_PAGE.items():
            element = element.replace(colour, css_colour)
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", element)

    return re.sub(r"<[^>]+>", of_page, text).strip()


@lru_cache(maxsize=4096)
def width(text: str, size: float) -> float:
    """Return the inches of one line of text at a font size in points."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        points, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)
    return float(points) / 72


def wrap_text(text: str, size: float, inches: float) -> str:
    """Break a text into lines of at most ``inches``, between words, or inside a word longer than a line."""
    lines = [""]
    for word in text.split(" "):
        line = f"{lines[-1]} {word}" if lines[-1] else word
        if width(line, size) <= inches:
            lines[-1] = line
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while width(lines[-1], size) > inches and len(lines[-1]) > 1:
            remainder = lines[-1]
            count = next(n for n in range(len(remainder) - 1, 0, -1) if n == 1 or width(remainder[:n], size) <= inches)
            lines[-1:] = [remainder[:count], remainder[count:]]
    return "\n".join(lines)


def spread_evenly(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` evenly spread positions of ``count``, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})


def new_figure(width: float, height: float) -> Figure:
    """Return a figure in inches, at 150 dots per inch, so that texts stay readable at half size."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def add_title(figure: Figure, text: str, below: str = "") -> None:
    title = wrap_text(label(text, TITLE), 13, figure.get_figwidth() - 1.0)
    figure.axes[0].set_title(f"{title}\n{below}".strip(), fontsize=13, loc="left")


def legend_below(figure: Figure) -> None:
    entries = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {text: handle for axes_entries in entries for handle, text in zip(*axes_entries, strict=True)}
    if not handles:
        return
    room = figure.get_figwidth() // (max(width(text, 10) for text in handles) + 0.65)
    columns = int(min(max(room, 1), len(handles), 4))
    rows = -(-len(handles) // columns)
    columns = -(-len(handles) // rows)  # rows of nearly equal length
    figure.set_figheight(figure.get_figheight() + 0.21 * rows)
    figure.legend(
        [*handles.values()], [*handles], fontsize=10, frameon=False, ncols=columns, loc="outside lower center"
    )


def heat_map(
    axes: Axes, values: npt.NDArray[Any], top: float, *, low: float = 0.0, texts: Mapping[tuple[int, int], str] = {},
    rows: Sequence[str] | None = None, columns: Sequence[str] | None = None, size: float = 10,
) -> AxesImage:  # fmt: skip
    """Draw a matrix in blue from ``low`` to ``top``, grey for missing values, with texts in some cells."""
    colours = colormaps["Blues"].with_extremes(bad="#eeeeee")
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=top, aspect="auto", interpolation="nearest")
    for (i, j), text in texts.items():
        dark = values[i, j] - low > 0.65 * (top - low)
        colour = "white" if dark else "#aaaaaa" if text == "0" else "#222222"
        number = axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
        number.set_in_layout(False)  # numbers lie inside the axes, and measuring all of them takes time
    name_cells(axes, rows, columns, length=0 if texts else 3)
    return image


def name_cells(axes: Axes, rows: Sequence[str] | None, columns: Sequence[str] | None, length: float) -> None:
    """Name rows and columns of a heat map, long columns at an angle. ``length`` of ticks is in points."""
    if columns is not None:
        long = any(len(name) > 5 for name in columns)
        slant: dict[str, Any] = {"rotation": 40, "rotation_mode": "anchor", "ha": "right"} if long else {}
        axes.set_xticks(range(len(columns)), columns, **slant)
    if rows is not None:
        axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=length)
    axes.spines[:].set_visible(False)


def whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, min_n_ticks=1)


def add_frame(axes: Axes) -> None:
    axes.tick_params(labelsize=11)
    axes.grid(True, color=GRID, lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def partition_picture(statistics: PartitionStatistics, *, title: str = "") -> Figure:
    """Draw every client's number of training samples by class.

    Of more than `DRAWN` clients as many are drawn, evenly spread by size. A coloured data set has a second panel with
    the background colour of every class of every client.
    """
    rows = statistics.spread(DRAWN)
    counts = np.asarray(statistics.counts)[rows]
    clients, classes = counts.shape
    client_count = len(statistics.counts)
    numbers = clients <= 20 and classes <= 20
    width = min(3.2 + 0.55 * classes, 14.0) if numbers else min(4.0 + 0.12 * classes, 14.0)
    height = min(1.9 + 0.42 * clients, 12.0) if numbers else min(2.5 + 0.06 * clients, 12.0)
    names = [label(name) for name in statistics.classes] if classes <= 20 else None
    labels = [label(name) for name in statistics.labels] if clients <= 20 else None
    room = max(map(len, names)) / 20 if names else 0.0  # for names at an angle
    beside = max(map(len, labels)) / 14 if labels and statistics.names else 0.0
    panels = 1 if statistics.colours is None else 2
    figure = new_figure(max(width, 5.0) + room + beside, panels * (max(height, 3.0) + room))
    axes, *below = figure.subplots(panels, 1, squeeze=False)[:, 0]
    texts = {(k, c): str(counts[k, c]) for k, c in np.ndindex(counts.shape)} if numbers else {}
    image = heat_map(axes, counts, max(int(counts.max(initial=0)), 1), texts=texts, rows=labels, columns=names)
    for panel in below:
        _colours(panel, statistics, rows)
        name_cells(panel, labels, names, 0 if numbers else 3)
    for panel in (axes, *below):
        panel.tick_params(labelsize=11)
        panel.set_xlabel("class", fontsize=12)
        panel.set_ylabel("client", fontsize=12)
        if clients < client_count:
            panel.set_yticks([])
            panel.set_ylabel(f"{clients} of {client_count:,} clients, largest first", fontsize=12)
    add_title(figure, title)
    bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=whole_numbers())
    bar.set_label("training samples", fontsize=12)
    bar.ax.tick_params(labelsize=11)
    return figure


def _colours(panel: Axes, statistics: PartitionStatistics, rows: npt.NDArray[np.int64]) -> None:
    """Draw the background colour of every class of every client, or nothing for a missing class."""
    assert statistics.colours is not None  # partition_picture
    present = (np.asarray(statistics.counts)[rows] > 0)[..., None]
    colours = statistics.colours[rows]
    opaque = np.concatenate([colours, np.full_like(colours[..., :1], 255)], axis=2)
    panel.imshow(np.where(present, opaque, 0).astype(np.uint8), aspect="auto", interpolation="nearest")
    of = "the images" if statistics.tied == 1 else f"{100 * statistics.tied:.0f} % of the images, others random"
    panel.set_title(f"background colour of {of}", fontsize=13, loc="left")


NUMBERS = 20
"""Classes up to which the matrix has counts. Of more classes the commonest mistakes are listed."""
MISTAKES = 5
_TOP, _HEAD, _AXIS, _GAP, _LINE = 0.4, 0.5, 0.3, 0.35, 0.2  # inches: titles, names of axes, between panels, a line
_LEAST = 0.08  # inches from one readable name to the next
_PAD = 2 / 72  # inches from a matrix to its names


def draw_confusions(confusions: Confusions, *, title: str = "") -> Figure:
    """Draw at least one matrix, of at least one class, on one scale: the share of a true class's images."""
    # All places are in inches, computed from the sizes of cells and of class names.
    classes = len(confusions.classes)
    numbers = classes <= NUMBERS
    cell = max(0.42 if classes <= 10 else 0.36, 2.1 / classes) if numbers else min(max(6 / classes, 0.1), 16 / classes)
    name_step = math.ceil(_LEAST / cell)  # of very many classes, only every so many have their names written
    names = [label(name, 18) for name in confusions.classes]
    size = min(9.0, cell * name_step * 72 * 0.8)
    room = max(len(name) for name in names) * size * 0.62 / 72 + 0.1
    upright = room > cell * name_step
    below = (room if upright else size / 72 + 0.1) + _AXIS
    # Of many classes, the most frequent mistakes are listed below the matrix.
    lists = [] if numbers else [list_mistakes(matrix, confusions.classes) for matrix in confusions.matrices.values()]
    notes = 0.1 + _LINE * (1 + max(len(lines) for lines in lists)) if lists else 0.0
    across = min(2 if numbers else 1, len(confusions.matrices))
    down = -(-len(confusions.matrices) // across)
    side, left = classes * cell, _AXIS + room
    wide, high = left + side + _GAP, _HEAD + side + below + notes
    width = max(across * wide + 0.8, 5.0)
    heading = wrap_text(label(title, TITLE), 12, width - 0.2)
    top = _TOP + 0.19 * heading.count("\n") if title else 0.0
    height = top + down * high
    figure = Figure(figsize=(width, height), dpi=150)
    inches = Affine2D().scale(1, -1).translate(0, height) + figure.dpi_scale_trans  # from the top left corner

    def write(x: float, y: float, text: str, size: float = 10, ha: str = "center", **how: Any) -> None:
        # As texts, which take half the time of ticks.
        figure.text(x, y, text, transform=inches, fontsize=size, **{"ha": ha, "va": "center", **how})

    # Each test set has a matrix with its share of right answers above, and names at its left and below.
    upwards: dict[str, Any] = {"rotation": 90, "rotation_mode": "anchor"}
    write(0.1, top / 2 + 0.02, heading, 12, "left")
    for number, (name, matrix) in enumerate(confusions.matrices.items()):
        x, y = number % across * wide + left, top + number // across * high + _HEAD  # of the upper left corner
        end = y + side
        axes = figure.add_axes((x / width, 1 - end / height, side / width, side / height))
        _matrix(axes, matrix, cell * 72 if numbers else 0.0)
        right, count = int(np.trace(matrix)), int(matrix.sum())
        write(x, y - 0.29, label(set_title(name)), 10, "left")
        write(x, y - 0.1, f"{100 * right / max(count, 1):.1f} % of {count:,} right", 9, "left")
        for c in range(0, classes, name_step):
            along = (c + 0.5) * cell
            write(x - _PAD, y + along, names[c], size, "right")
            under: dict[str, Any] = {"ha": "right", **upwards} if upright else {"va": "top"}
            write(x + along, end + _PAD, names[c], size, **under)
        write(x + side / 2, end + below - 0.13, "predicted class")
        write(x - left + 0.15, y + side / 2, "true class", **upwards)
        for row, line in enumerate(("most frequent mistakes", *lists[number]) if lists else ()):
            write(x, end + below + 0.1 + row * _LINE, line, 9, "left", color="black" if row else GREY)
    # All matrices share one scale, at the right.
    x, y = across * wide - _GAP + 0.15, top + _HEAD
    bar = figure.add_axes((x / width, 1 - (y + side) / height, 0.12 / width, side / height))
    heat_map(bar, np.linspace(1, 0, 256)[:, None], 1.0, rows=[], columns=[])
    for share in (0.0, 0.5, 1.0):
        write(x + 0.17, y + (1 - share) * side, f"{100 * share:.0f} %", 8, "left")
    write(x + 0.65, y + side / 2, "share of the true class", **upwards)
    return figure


def list_mistakes(matrix: npt.NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    """Return the most frequent mistakes of a matrix as lines, the lower class first among equal counts."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]]
    return [f"{label(classes[i])} taken for {label(classes[j])}: {wrong[i, j]:,}" for i, j in pairs]


def _matrix(axes: Axes, matrix: npt.NDArray[np.int64], points: float) -> None:
    """Draw one matrix. ``points`` is the cell size, or 0 for no numbers."""
    totals = matrix.sum(1, keepdims=True)
    share = np.ma.masked_invalid(np.where(totals > 0, matrix / np.maximum(totals, 1), np.nan))
    texts = {(i, j): str(matrix[i, j]) for i, j in np.argwhere(matrix)} if points else {}
    digits = len(str(int(matrix.max(initial=0))))
    heat_map(axes, share, 1.0, texts=texts, rows=[], columns=[], size=min(10.0, 1.4 * points / digits) or 1.0)
    axes.spines[:].set(visible=True, color="#cccccc")
