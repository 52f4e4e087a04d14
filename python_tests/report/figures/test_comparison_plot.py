"""Curves of a comparison."""

import numpy as np

from fedkern.report.figures.comparison_plot import comparison_panels, mean_curve
from fedkern.report.figures.curves import draw_panels
from fedkern.report.figures.plots import save_png


def curves(*args, title="", **more):
    return draw_panels([*comparison_panels(*args, **more).values()], title=title)


def run(*values, step=1):
    return [{"round": step * (i + 1), "accuracy": value} for i, value in enumerate(values)]


def test_a_curve_has_the_rounds_that_all_runs_have():
    rounds, values = mean_curve([run(0.1, 0.2, 0.3, 0.4), run(0.3, 0.5, step=2), [{"round": 1}]], "accuracy")
    assert rounds.tolist() == [2, 4]
    assert np.allclose(values, [[0.2, 0.4], [0.3, 0.5]])


def test_runs_without_figures_have_no_picture():
    assert comparison_panels({"a": [[{"round": 1}]]}, ["accuracy"]) == {}


def test_many_groups_and_odd_names_are_drawn(tmp_path):
    groups = {f"method ${i}_x": [run(0.1, 0.2), run(0.2, 0.4)] for i in range(30)}
    figure = curves({**groups, "one-shot": [run(0.5)]}, ["accuracy", "none"], title="a $ b")
    assert len(figure.axes[0].get_lines()) == 31
    assert len(figure.legends[0].get_texts()) == 24
    save_png(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_axes_have_the_figure_s_name_for_people():
    figure = curves({"a": [[{"round": 1, "ood_macro_auroc": 0.5}]]}, ["ood_macro_auroc"])
    assert figure.axes[0].get_ylabel() == "macro AUROC, out of distribution (%)"


def test_names_of_groups_stand_under_the_axes():
    groups = {f"fedgid lr=0.01 alpha=0.{i} rounds=100 x": [run(0.1 * i, 0.9 - 0.1 * i)] * 2 for i in range(9)}
    figure = curves(
        groups, ["accuracy"], title="a title that is longer than its picture " * 2, chance={"accuracy": 0.1}
    )
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
