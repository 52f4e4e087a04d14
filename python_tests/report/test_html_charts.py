"""Charts of a report: valid figures of plotly, bounded in size, with texts and tables of the same figures."""

import json
import math

import numpy as np
import pytest

from fedkern.report.html_charts import POINTS, ROWS, ROWS_OF_BARS, Series, bars, curves, dots, evenly, heat, shown

plotly = pytest.importorskip("plotly.graph_objects", reason="needs plotly: pip install 'fedkern[report]'")


def valid(chart):
    """Checks every property with plotly, and that the figure is JSON."""
    plotly.Figure(data=list(chart.data), layout=dict(chart.layout))
    json.dumps([chart.data, chart.layout], allow_nan=False)
    assert all(len(row) == len(chart.table.header) for row in chart.table.rows)
    return chart


def test_curves_have_colours_dashes_and_marks_of_their_own():
    series = [Series(f"client {k}", [1, 2, 3], [k, k + 0.5, math.nan]) for k in range(9)]
    chart = valid(curves("a", "A", [*series, Series("validation", [1], [2.0], soft=True)], axis="loss"))
    looks = [(trace["meta"].get("slot"), trace["line"]["dash"], trace["marker"]["symbol"]) for trace in chart.data[:9]]
    assert len(set(looks)) == 9
    assert chart.data[9]["meta"] == {"soft": True}
    assert chart.data[9]["mode"] == "lines"
    assert chart.data[0]["y"] == [0, 0.5, None]
    assert chart.text.startswith("client 0: 0 in round 1, 0.5 in round 2; client 1: 1 in round 1")
    assert chart.text.endswith("; and 4 more.")
    assert chart.table.rows[0] == ["1", "0", "1", "2", "3", "4", "5", "6", "7", "8", "2"]
    assert chart.table.rows[2][1] == "–"


def test_a_long_curve_is_thinned_and_says_so():
    rounds = list(range(1, 10_001))
    chart = valid(curves("a", "A", [Series("x", rounds, [1e6 * r for r in rounds])], axis="sent", unit="B"))
    assert len(chart.data[0]["x"]) == POINTS
    assert (chart.data[0]["x"][0], chart.data[0]["x"][-1]) == (1, 10_000)
    assert chart.data[0]["y"][-1] == 10
    assert chart.layout["yaxis"]["title"]["text"] == "sent (GB)"
    assert len(chart.table.rows) == ROWS
    assert chart.table.caption == "30 of 10000 rounds"
    assert chart.table.rows[-1] == ["10000", "10.0 GB"]
    assert len(json.dumps(chart.data)) < 40_000


def test_a_band_belongs_to_its_curve():
    chart = valid(curves("a", "A", [Series("x", [1, 2], [10, 20], [9, 18], [11, 22])], axis="accuracy", unit="%"))
    low, high, mean = chart.data
    assert (low["y"], high["y"], mean["y"]) == ([9, 18], [11, 22], [10, 20])
    assert high["fill"] == "tonexty"
    assert low["meta"] == high["meta"] == {"slot": 0, "band": True}
    assert mean["text"] == ["10.0 %", "20.0 %"]


def test_bars_of_many_labels_are_the_lowest():
    labels = [f"class {i}" for i in range(100)]
    values = [float(100 - i) for i in range(100)]
    chart = valid(bars("a", "A", labels, [Series("recall", y=[None, *values[1:]])], axis="recall", unit="%"))
    assert len(chart.data[0]["y"]) == ROWS_OF_BARS
    assert chart.data[0]["y"][0] == "class 99"
    assert chart.note == "The 40 lowest of 100."
    assert chart.text == "lowest 1.0 % (class 99), highest 99.0 % (class 1)."


def test_equal_names_stay_apart():
    chart = valid(bars("a", "A", ["same", "same"], [Series("x", y=[1, 2]), Series("y", y=[3, None])], axis="x"))
    assert chart.data[0]["y"] == ["same", "same (2)"]
    assert len({json.dumps(trace["marker"]) for trace in chart.data}) == 2
    assert chart.table.rows == [["same", "1", "3"], ["same", "2", "–"]]


def test_a_heat_map_has_counts_behind_its_shares():
    counts = np.array([[3, 1], [0, 0]])
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    chart = valid(heat("a", "A", shares, ["x", "y"], ["<b>", "d"], counts, row="client", column="class", text="t"))
    (trace,) = chart.data
    assert trace["z"] == [[75, 25], [0, 0]]
    assert trace["customdata"] == [[3, 1], [0, 0]]
    assert trace["x"] == ["&lt;b>", "d"]
    assert chart.table.header == ["client \\ class", "<b>", "d"]
    assert chart.table.rows == [["x", "3", "1"], ["y", "0", "0"]]


def test_a_large_heat_map_has_a_bounded_table_and_height():
    counts = np.ones((500, 100), dtype=int)
    names = [str(i) for i in range(500)]
    chart = valid(heat("a", "A", counts, names, names[:100], counts, row="r", column="c", text="t"))
    assert "texttemplate" not in chart.data[0]
    assert chart.layout["height"] == 900
    assert len(chart.table.rows) == 30
    assert len(chart.table.header) == 21
    assert chart.table.caption == "number of images; 30 of 500 rows; 20 of 100 columns"


def test_dots_of_runs_and_their_mean():
    chart = valid(dots("a", "A", [("one", [10, 20], 15, 7.07), ("two", [30], 30, None)], axis="accuracy"))
    assert chart.data[0]["x"] == [10, 20]
    assert chart.data[1]["error_x"]["array"] == [7.07]
    assert "error_x" not in chart.data[3]
    assert chart.table.rows[1] == ["two", "30.0 %", "30.0 %", "–"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(None, "%", "–"), (math.inf, "", "–"), (12.34, "%", "12.3 %"), (44695848, "B", "44.7 MB"), (0.4213, "s", "0.42 s"),
     (1234.0, "images", "1,234"), (0.12345, "", "0.123")],
)  # fmt: skip
def test_values_as_texts(value, unit, text):
    assert shown(value, unit) == text


def test_evenly_spread_positions():
    assert evenly(3, 10) == [0, 1, 2]
    assert evenly(100, 4) == [0, 33, 66, 99]
