"""Curves of clients and comparisons, texts in figures, and the import of matplotlib."""

import os
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.report.figures.curves import (
    accuracy_panels,
    client_curves,
    comparison_panels,
    draw_panels,
    mean_curve,
    weight_panels,
)
from fedkern.report.figures.pictures import write_pictures
from fedkern.report.figures.plots import DRAWN, ORANGE, save_png, width, wrap_text
from fedkern.settings.config import RunConfig


def records(clients, rounds=3):
    rng = np.random.default_rng(0)
    for r in range(rounds):
        info = {str(k): {"weight": float(w), "own_loss": 2.0 - w} for k, w in enumerate(rng.dirichlet([2] * clients))}
        if r == 1:
            info.pop("0")  # took no part
        yield {"round": r + 1, "clients": info}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("clients", [3, 120])
def test_weights_and_losses_are_drawn(clients, tmp_path):
    path = tmp_path / "weights.png"
    save_png(weights_picture(list(records(clients))), path)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    blue, orange = ((np.abs(pixels - np.array(rgb)).sum(1) < 30).sum() for rgb in ((0, 114, 178), (213, 94, 0)))
    assert orange > 100
    assert (blue > 100) == (clients == 3)


def weights_picture(records, *, by_samples=False, page=False):
    return draw_panels(weight_panels(records, by_samples=by_samples), title="t", stacked=True, page=page)


def centre_lines(monkeypatch):
    """Return the heights of the dotted lines."""
    found = []
    drawn = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **style: found.append(y) or drawn(self, y, **style))
    return found


def test_the_line_of_equal_weights(monkeypatch):
    found = centre_lines(monkeypatch)
    assert weights_picture(list(records(4)))
    assert found == [0.25]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("settings", [{}, {"sample_fraction": 0.67}])
def test_the_lines_of_weights_by_samples(settings, tmp_path, monkeypatch):
    """The lines are the weights at the beginning of a real run, also if a client misses the first round."""
    found = centre_lines(monkeypatch)
    small = {"train_samples": 90, "rounds": 3, "local_epochs": 1, "width": 2, "grad_cam": 0, **settings}
    options = {"weighting": "samples"}
    run(RunConfig.make("afl", data="digits", clients=3, **small, options=options), out=tmp_path)
    write_pictures(tmp_path)
    seen = {}
    for record in read_metrics(tmp_path):
        seen |= {client: info["samples"] for client, info in record["clients"].items()}
    chance, *weights = found
    assert chance > 1  # of accuracy.png, in per cent
    assert weights == [pytest.approx(seen[client] / 90) for client in sorted(seen)]
    assert len(set(weights)) == 3


@pytest.mark.parametrize(("by_samples", "called"), [(False, "equal weights"), (True, "share of the samples")])
def test_the_legend_names_the_dotted_lines_last(by_samples, called):
    found = list(records(3))
    for record in found:
        for info in record["clients"].values():
            info["samples"] = 5
    (legend,) = weights_picture(found, by_samples=by_samples).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["client 0", "client 1", "client 2", called]


def test_weights_begin_at_zero_and_losses_where_they_are():
    found = list(records(3))
    for record in found:
        for info in record["clients"].values():
            info["own_loss"] += 100
    weight, loss = weights_picture(found).axes
    assert weight.get_ylim()[0] == 0
    assert loss.get_ylim()[0] > 100


def test_other_methods_have_no_such_picture():
    assert weight_panels([{"round": 1, "clients": {"0": {"loss": 1.0}}}, {"round": 2}]) == []


def test_clients_are_called_by_their_names(monkeypatch):
    called = []
    drawn = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *xy, **s: called.append(s["label"]) or drawn(self, *xy, **s))
    found = list(records(2))
    for record in found:
        record["clients"]["1"]["name"] = "Bonn"
    assert weights_picture(found)
    assert called[:2] == ["client 0", "Bonn"]
    assert [curve.name for curve in client_curves(found, "weight")] == ["client 0", "Bonn"]


def test_many_clients_are_drawn_in_part():
    found = list(records(1000))
    figure = weights_picture(found)
    drawn = [line.get_color() for axes in figure.axes for line in axes.get_lines() if line.get_linestyle() != ":"]
    assert len(drawn) / 2 == DRAWN + 1
    assert drawn.count(ORANGE) == 2  # the heaviest, in both panels
    (legend,) = figure.legends
    heaviest = max(found[-1]["clients"], key=lambda k: found[-1]["clients"][k]["weight"])
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [f"{DRAWN} of 1,000 clients", f"client {heaviest}", "equal weights"]


def test_of_many_clients_a_text_tells_the_highest_the_middle_and_the_lowest_value():
    found = list(records(13))
    three = {curve.name: curve.values for curve in client_curves(found, "weight")}
    values = [sorted(info["weight"] for info in record["clients"].values()) for record in found]
    assert three["highest"] == [curve[-1] for curve in values]
    assert three["middle"] == [float(np.median(curve)) for curve in values]
    assert three["lowest"] == [curve[0] for curve in values]
    assert [[curve.name for curve in panel.summary] for panel in weight_panels(found)] == [[*three], [*three]]


def test_long_names_have_room_in_the_legend_of_a_page():
    found = list(records(6))
    for record in found:
        for client, info in record["clients"].items():
            info["name"] = f"University Hospital {client}"
    figure = weights_picture(found, page=True)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    width = legend.get_window_extent().width
    assert width <= figure.bbox.width


# -- comparison plot ---------------------------------------------------------------------------------------------------


def curves(*args, title="", **more):
    return draw_panels([*chain(*comparison_panels(*args, **more).values())], title=title)


def rows_of_run(*values, step=1):
    return [{"round": step * (i + 1), "accuracy": value} for i, value in enumerate(values)]


def test_a_curve_has_the_rounds_that_all_runs_have():
    rounds, values = mean_curve(
        [rows_of_run(0.1, 0.2, 0.3, 0.4), rows_of_run(0.3, 0.5, step=2), [{"round": 1}]], "accuracy"
    )
    assert rounds.tolist() == [2, 4]
    assert np.allclose(values, [[0.2, 0.4], [0.3, 0.5]])


def test_runs_without_figures_have_no_picture():
    assert comparison_panels({"a": [[{"round": 1}]]}, ["accuracy"]) == {}


def test_many_groups_and_odd_names_are_drawn(tmp_path):
    groups = {f"method ${i}_x": [rows_of_run(0.1, 0.2), rows_of_run(0.2, 0.4)] for i in range(30)}
    figure = curves({**groups, "one-shot": [rows_of_run(0.5)]}, ["accuracy", "none"], title="a $ b")
    assert len(figure.axes[0].get_lines()) == 31
    assert len(figure.legends[0].get_texts()) == 24
    save_png(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_axes_have_the_figure_s_name_for_people():
    figure = curves({"a": [[{"round": 1, "ood_macro_auroc": 0.5}]]}, ["ood_macro_auroc"])
    assert figure.axes[0].get_ylabel() == "macro AUROC, out of distribution (%)"


def test_names_of_groups_stand_under_the_axes():
    groups = {f"fedgid lr=0.01 alpha=0.{i} rounds=100 x": [rows_of_run(0.1 * i, 0.9 - 0.1 * i)] * 2 for i in range(9)}
    figure = curves(groups, ["accuracy"], title="a title longer than its picture " * 2, chance={"accuracy": 0.1})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*groups, "commonest class"]
    box, (axes,) = legend.get_window_extent(), figure.axes
    assert 0 <= box.y0 < box.y1 <= axes.get_tightbbox().y0
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert axes._left_title.get_window_extent().x1 <= figure.bbox.width
    assert axes.get_title(loc="left").endswith("\nmean and standard deviation over seeds")
    assert [10, 10] in [list(line.get_ydata()) for line in axes.get_lines()]


def test_curves_are_over_the_clock_where_a_run_is_asynchronous_and_all_have_one():
    def records(step, **more):
        return [
            [{"round": i, "accuracy": 0.1 * i, "clock": seed * step * i, **more} for i in (1, 2)] for seed in (1, 3)
        ]

    def draw(**groups):
        axes = curves(groups, ["accuracy"]).axes[0]
        return axes.get_xlabel(), {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}

    label, lines = draw(whole=records(10.0), stale=records(2.0, staleness=1.0))
    assert label.startswith("virtual clock")
    assert lines == {"whole": [20, 40], "stale": [4, 8]}  # means over the seeds
    for groups in (
        {"whole": records(10.0), "other": records(2.0)},
        {"stale": records(2.0, staleness=1.0), "none": [[{"round": i, "accuracy": 0.1} for i in (1, 2)]]},
    ):
        label, lines = draw(**groups)
        assert label == "communication round"
        assert [*lines.values()] == [[1, 2], [1, 2]]


def test_curves_are_over_simulated_time_and_bytes_where_all_runs_have_devices():
    def records(seconds):
        return [
            {"round": i, "accuracy": 0.1 * i, "simulated_seconds": seconds * i, "bytes_up": 5000 * i} for i in (1, 2)
        ]

    def places(figure):
        return {axes.get_xlabel(): [list(line.get_xdata()) for line in axes.get_lines()] for axes in figure.axes}

    figure = curves({"a": [records(60.0)], "b": [records(90.0)]}, ["accuracy"])
    titles = ["simulated time", "uploaded by all clients"]
    assert places(figure) == dict(zip(titles, [[[60, 120], [90, 180]], [[5000, 10000]] * 2], strict=True))
    figure.draw_without_rendering()
    assert all(text.get_text().endswith(" s") for text in figure.axes[0].get_xticklabels())
    panels = accuracy_panels([{"round": -1}, *records(60.0)], "accuracy")
    assert places(draw_panels(panels, page=True)) == dict(zip(titles, [[[60, 120]], [[5000, 10000]]], strict=True))


# -- plots -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["accuracy", "WWW iii", "$a_{$", ""])
def test_widths_are_those_of_drawn_texts(text):
    figure = Figure(figsize=(4, 2), dpi=100)
    drawn = figure.text(0, 0.5, text, fontsize=12, parse_math=False)
    if text:
        box = drawn.get_window_extent(FigureCanvasAgg(figure).get_renderer())
        assert width(text, 12) == pytest.approx(box.width / 100, abs=0.04)
    else:
        assert width(text, 12) == 0


def test_lines_are_broken_between_words_and_inside_long_ones():
    assert wrap_text("one two", 9, 10) == "one two"
    assert wrap_text("malignant melanoma, taken for nevus", 9, 1.2) == "malignant\nmelanoma, taken\nfor nevus"
    lines = wrap_text("W" * 30, 9, 1.0).split("\n")
    assert "".join(lines) == "W" * 30
    assert max(width(line, 9) for line in lines) <= 1.0
    assert wrap_text("WW", 9, 0.01) == "W\nW"
    assert wrap_text("", 9, 1.0) == ""


def test_a_file_has_the_drawn_pixels_and_tells_its_resolution(tmp_path):
    figure = Figure(figsize=(2, 1), dpi=150, facecolor="#0072B2")
    save_png(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (300, 150))
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert (np.asarray(image) == (0, 0x72, 0xB2)).all()


# -- matplotlib import -------------------------------------------------------------------------------------------------


CODE = """
import sys
{before}
from fedkern.process.interrupts import in_order
from fedkern.report.figures.matplotlib_import import without_docstrings
with in_order(to_the_end={last}):
    try:
        with without_docstrings():
            import matplotlib.lines
            {inside}
    except KeyError:
        pass
from matplotlib.artist import kwdoc
from matplotlib.lines import Line2D
print("solid_capstyle" in Line2D.set.__doc__, "solid_capstyle" in kwdoc(Line2D))
"""


def find_docs(last: bool, before: str = "", inside: str = "pass", **environment: str) -> str:
    """Return whether a line's properties are in its docstring, and whether matplotlib can list them."""
    code = CODE.format(last=last, before=before, inside=inside)
    words, variables = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(words, env=variables, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("inside", ["import os; assert os.environ['MPLBACKEND'] == 'nonsense'", "raise KeyError"])
def test_a_command_imports_it_without_tables_of_properties_and_needs_no_backend_of_the_user(inside):
    assert find_docs(True, inside=inside, MPLBACKEND="nonsense") == "False True"


def test_a_script_has_them():
    assert find_docs(False) == "True True"


def test_who_has_imported_it_keeps_them():
    assert find_docs(True, before="import matplotlib.artist") == "True True"
