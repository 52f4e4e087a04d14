"""Accuracy of FuseFL and its rivals against upload and against memory, the figure of docs/fusefl.md.

    python -m benchmarks.studies.fusefl_figure

Draws ``benchmarks/studies/results/fusefl_upload_memory.png`` from ``fusefl.json``; parameters are those of
``fusefl_cifar10_width.json``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.page import RESULTS, by_seed, load, read_rows
from fedkern.report.figures import plots

LOOKS = {"FuseFL": (plots.BLUE, "o"), "one-shot FedAvg": (plots.ORANGE, "s"), "ensemble": (plots.GREY, "D")}
CLIENTS = 5
SIZE = " of width "
PANELS = {
    "a client sends, MB": [0.1, 0.2, 0.5, 1, 2],
    "parameters of the final model, thousands": [10, 20, 50, 100, 200, 500],
}
"""Titles of the axes, with where they have ticks."""


def points(rows: list[Mapping[str, Any]]) -> dict[str, tuple[float, float, list[float]]]:
    """Return bytes that a client sends, parameters of the final model and accuracies in per cent by seed, by cell."""
    parameters, figures = load("fusefl_cifar10_width"), {}
    for row in rows:
        if row["table"] == "upload and memory" and row["ours"] is not None:
            size = parameters[row["name"].replace(" of", ",")]["parameters"]
            figures[row["name"]] = row["bytes_up"] / CLIENTS, size, [100 * value for value in by_seed(row).values()]
    return figures


def draw(rows: list[Mapping[str, Any]], path: Path) -> None:
    """Draw two panels with a common axis of accuracy, a thin mark for each seed and a large one for the mean."""
    figure = plots.new_figure(8.4, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for place, (panel, (title, ticks)) in enumerate(zip(panels, PANELS.items(), strict=True)):
        for name, point in points(rows).items():
            method, width = name.split(SIZE)
            colour, mark = LOOKS[method]
            at, values = (point[0] / 1e6, point[1] / 1e3)[place], point[2]
            mean = sum(values) / len(values)
            panel.plot([at] * len(values), values, mark, color=colour, markersize=4, alpha=0.35)
            panel.plot(at, mean, mark, color=colour, markersize=9, label=method if width == "16" else None)
            panel.annotate(f"width {width}", (at, mean), (8, 5), textcoords="offset points", fontsize=8)
        panel.set_xscale("log")
        # Tick labels of a log axis are formulas, which fedkern's figures show as text.
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.margins(x=0.2)
        panel.set_xlabel(title)
        plots.add_frame(panel)
    panels[0].set_ylabel("accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    plots.save_png(figure, path)


if __name__ == "__main__":
    draw(list(read_rows("fusefl").values()), RESULTS / "fusefl_upload_memory.png")
