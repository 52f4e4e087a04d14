"""Charts of README.md and of the methods' result pages, drawn from recorded results as reports draw theirs.

``python -m benchmarks.pages`` writes them.  A chart holds the hash of its contents, so that ``--check`` finds an old
one without drawing it anew.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from benchmarks import bench_methods, comparisons, method_gains
from benchmarks.page import load, read_rows
from fedkern.report.figures.curves import comparison_panels, draw_panels
from fedkern.report.figures.plots import BLUE, GREY, ORANGE, add_frame, new_figure, to_svg

STYLE = """<style>
svg { background: #ffffff; color: #1a1d21; --line: #d5dae0; --soft: #555d66; --blue: #0072b2; }
@media (prefers-color-scheme: dark) {
  svg { background: #14171b; color: #e8eaed; --line: #39414b; --soft: #a7b0ba; --blue: #3d94d6; }
}
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { fill: currentColor; }
</style>"""
NAMES = {"fedgid": "FedGID", "fusefl": "FuseFL", "fedlpfm": "Fed-LPFM", "fediod": "FedIOD", "feddra": "FedDRA",
         "fedavg": "FedAvg", "fedprox": "FedProx", "scaffold": "SCAFFOLD"}  # fmt: skip
"""Runs of the speed chart."""
FRAMEWORKS = ("Flower", "BlazeFL", "pfl", "FedLab", "fluke", "lean loop")


@dataclass(frozen=True)
class Row:
    """Line of a chart: a heading, or a value, with or without the ends of its interval."""

    name: str
    value: float | None = None
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Drawing:
    """Figure in docs/charts."""

    name: str

    @property
    def path(self) -> str:
        """Return the file's path from the repository's root."""
        return f"docs/charts/{self.name}.svg"

    @property
    def mark(self) -> str:
        """Return the attribute with the hash of the chart's contents."""
        return f'data-results="{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}"'

    def figure(self) -> Figure:
        """Return the drawn figure."""
        raise NotImplementedError

    def draw(self) -> str:
        """Return the chart as the text of an SVG file, for light and for dark pages."""
        svg = to_svg(self.figure(), self.name)
        text = re.sub(r'style="--wide: (\d+)px"', rf'width="\1" {self.mark}', svg, count=1)
        return text.replace(">", f">\n{STYLE}", 1) + "\n"


@dataclass(frozen=True)
class Curves(Drawing):
    """Mean accuracy of every cell of a study, over simulated time and over bytes."""

    groups: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]

    def figure(self) -> Figure:
        return draw_panels(comparison_panels(self.groups, ["accuracy"])["accuracy"])


@dataclass(frozen=True)
class Chart(Drawing):
    """Chart of rows, whose ``neutral`` value separates better from worse."""

    axis: str
    neutral: float
    rows: Sequence[Row]

    def figure(self) -> Figure:
        figure = new_figure(6.2, 0.6 + 0.27 * len(self.rows))
        axes = figure.subplots()
        add_frame(axes)
        axes.grid(False, axis="y")
        axes.set_axisbelow(True)
        axes.axvline(self.neutral, color=GREY, lw=1)
        axes.set_yticks(range(len(self.rows)), [row.name for row in self.rows], fontsize=10)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(self.rows) - 0.5, -0.5)
        axes.set_xlabel(self.axis, fontsize=11)
        for place, (row, tick) in enumerate(zip(self.rows, axes.get_yticklabels(), strict=True)):
            if row.value is None:
                tick.set_fontweight("bold")
            elif row.ends is None:
                axes.bar_label(axes.barh(place, row.value, 0.7, color=BLUE), [f"{row.value:.1f}×"], padding=3)
            else:
                low, high = row.ends
                colour = BLUE if low > self.neutral else ORANGE if high < self.neutral else GREY
                errors = [[row.value - low], [high - row.value]]
                axes.errorbar(row.value, place, xerr=errors, fmt="o", ms=6, color=colour, capsize=4)
        axes.margins(x=0.1)
        return figure


def speed_chart() -> Chart:
    """Return whole runs beside plain PyTorch, and rounds of FedAvg beside other frameworks."""
    plain = load("methods_amd-epyc", comparisons.RESULTS)["cases"]
    runs = {row["method"]: bench_methods.Row(**row) for row in plain if row["setting"] == "default"}
    bars = [Row(title, round(runs[name].speedup(bench_methods.PLAIN) or 0, 2)) for name, title in NAMES.items()]
    (recorded,) = (file for file in comparisons.read_results()["rounds"] if file.name == "rounds-intel-xeon")
    rounds = next(row.speedup for row in recorded.rows if row.threads == 2)
    frameworks = [Row(name, round(rounds[name], 2)) for name in FRAMEWORKS]
    heads = Row("Whole runs, over plain PyTorch"), Row("A round of FedAvg, over")
    return Chart("speed", "times as fast, two CPU cores", 1, (heads[0], *bars, heads[1], *frameworks))


def networks_chart() -> Chart:
    """Return training steps under accelerate and in channels-last, over the same networks as written."""
    recorded = next(file for file in comparisons.read_results()["guest"] if file.name == "guest-amd-epyc-2")
    gains = {row.case.rpartition(", B=")[0]: row.speedup for row in recorded.rows}
    served = [Row(name, round(gain["eager"], 2)) for name, gain in gains.items()]
    last = [
        Row(name, round(gain["eager"] / gain["channels_last"], 2))
        for name, gain in gains.items()
        if "channels_last" in gain
    ]
    rows = (Row("fedkern.accelerate"), *served, Row("channels_last"), *last)
    return Chart("networks", "times as fast as written, one CPU core", 1, rows)


def forest(tool: method_gains.Tool) -> Chart:
    """Return the paired differences of a method over all settings played."""
    rows: list[Row] = []
    for setting in dict.fromkeys(contest.setting for contest in tool.contests):
        played = [contest for contest in tool.contests if contest.setting == setting and contest.commits]
        rows += [Row(setting)] * bool(played)
        for contest in played:
            mean, low, high = contest.ends()
            rows.append(Row(f"{contest.form} over {contest.rival}".replace("`", ""), mean, (low, high)))
    return Chart(tool.page.removesuffix(".md"), tool.unit, 0, tuple(rows))


def devices_curves() -> Curves:
    """Return the accuracy of whole and compressed uploads on simulated devices."""

    def records(curve: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]

    rows = read_rows("devices").items()
    return Curves("devices", {name: [records(run["curve"]) for run in row["runs"].values()] for name, row in rows})


def all_charts() -> list[Drawing]:
    """Return every chart of the pages."""
    return [speed_chart(), networks_chart(), *map(forest, method_gains.tools()), devices_curves()]
