"""Numbers for people, and tables of them and of texts on a terminal, in Markdown and in LaTeX."""

import dataclasses
import io
import re

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from rich.text import Text

from fedkern.data import PartitionStatistics
from fedkern.report import tables
from fedkern.text_table import Table
from python_tests.html_reader import Reader


def text(renderable) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    return console.file.getvalue()


def test_bytes_and_times():
    sizes = {0: "0 B", 999: "999 B", 1000: "1.00 kB", 44_695_848: "44.7 MB", 999_499: "999 kB", 999_600: "1.00 MB",
             3.2e9: "3.20 GB", 7e18: "7000 PB"}  # fmt: skip
    assert {count: tables.human_bytes(count) for count in sizes} == sizes
    times = {0.25: "0.25 s", 12.34: "12.3 s", 59.96: "1 min 00 s", 185: "3 min 05 s", 7620: "2 h 07 min"}
    assert {seconds: tables.human_time(seconds) for seconds in times} == times


def test_the_order_of_figures():
    names = tables.sort_metrics({"ood_loss": 1.0, "ood_accuracy": 0.5, "id_accuracy": 0.6, "note": "x"})
    assert names == ["id_accuracy", "ood_accuracy", "ood_loss"]


def make_summary(method, data, metrics, **more):
    figures = {"seed": 0, "rounds": 1, "seconds": 3.0, "bytes": {"up": 10, "down": 20}, "metrics": metrics}
    return {"method": method, "data": data, **figures, **more}


def test_final_table():
    metrics = {"ood_accuracy": 0.934, "id_accuracy": 0.96, "validation_accuracy": 0.1234}
    sent = {"up": 75_000_000, "down": 76_000_000}
    summary = make_summary("fedgid", "colordigits", metrics, seed=3, rounds=40, seconds=80.0, bytes=sent)
    shown = text(tables.final_table(summary, "accuracy"))
    assert "fedgid on colordigits, seed 3, 40 rounds" in shown
    assert re.search(r"in distribution +out of distribution", shown)
    (row,) = (line for line in shown.splitlines() if "accuracy" in line)
    assert row.split() == ["accuracy", "96.0", "%", "93.4", "%"]
    for part in ("75.0 MB", "76.0 MB", "2.0 s", "1 min 20 s"):
        assert part in shown
    assert "12.3 %" not in shown  # the validation set chooses; it is no result


@pytest.mark.parametrize("name", ["validation_north", "id_north", "test_2"])
def test_figures_of_a_set_of_any_name_are_shown(name):
    shown = text(
        tables.figures_table("evaluate", {f"{name}_accuracy": 0.625, "validation_accuracy": 0.125}, [name], "accuracy")
    )
    assert "62.5 %" in shown
    assert "12.5 %" not in shown


def test_final_table_of_a_single_test_set():
    metrics = {"accuracy": 0.5, "loss": 1.2345, "worst_client_loss": 2.0}
    sent = {"up": 10, "down": 20, "one_off_up": 5, "one_off_down": 0}
    summary = make_summary("fedavg", "digits", metrics, bytes=sent)
    lines = [line.split() for line in text(tables.final_table(summary, "accuracy")).splitlines()]
    assert ["accuracy", "50.0", "%"] in lines
    assert ["loss", "1.23"] in lines
    assert ["worst", "client", "loss", "2"] in lines
    assert ["sent", "once,", "before", "training", "(up)", "5", "B"] in lines


def test_final_table_of_retrieval():
    figures = {"i2t_r1": 0.5, "t2i_r10": 0.75, "gallery": 40.0, "loss": 3.0}
    unseen = {f"unseen_{name}": value / 2 for name, value in figures.items()}
    summary = make_summary("feddra", "captions", {**figures, **unseen, "worst_client_i2t_r1": 0.25})
    lines = [" ".join(line.split()) for line in text(tables.final_table(summary, "accuracy")).splitlines()]
    assert "test unseen client" in lines
    assert lines.index("image to text, recall at 1 50.0 % 25.0 %") < lines.index("loss 3 1.5")
    assert "text to image, recall at 10 75.0 % 37.5 %" in lines
    assert "worst client: image to text, recall at 1 25.0 %" in lines
    assert "candidates in retrieval 40 20" in lines


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [("best_teacher", 0.481, "48.1 %"), ("ood_ensemble_weighted", 0.92, "92.0 %"), ("id_accuracy", 0.9123, "91.2 %"),
     ("teacher_agreement", 0.5, "50.0 %"), ("north_t2i_r20", 0.25, "25.0 %"), ("id_loss", 0.91234, "0.912"),
     ("levels_up_bytes", 1_234_567.0, "1.23 MB"), ("memory_ratio", 1.0, "1"),
     ("proxy_training_mflops", 1234.56, "1,234.6 MFLOP"), ("proxy_parameters", 19_810.0, "19,810"),
     ("loss", 1234.5, "1.23e+03")],
)  # fmt: skip
def test_a_kind_of_figure_has_one_unit(name, value, shown):
    assert tables.human_metric(name, value) == shown


def test_class_table_of_few_classes():
    recall = {"nevus": 0.912, "melanoma": None}
    summary = {"per_class": {"id": {"recall": recall}, "ood": {"recall": {"nevus": 0.5, "melanoma": 0.25}},
                             "validation": {"recall": {"nevus": 0.111}}}}  # fmt: skip
    shown = text(tables.class_table(summary))
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines[0] == "recall of every class"
    assert "in distribution out of distribution" in lines
    assert "nevus 91.2 % 50.0 %" in lines
    assert "melanoma none 25.0 %" in lines
    assert 'means leave out 1 of 2 classes without samples (in distribution): "melanoma"' in lines
    assert "11.1" not in shown
    assert tables.class_table({}) is None
    assert tables.class_table({"per_class": {"validation": {"recall": recall}}}) is None


def test_class_table_of_many_classes_has_the_lowest():
    recalls = {f"class {c}": 0.9 - 0.05 * c for c in range(10)}
    recalls["class 3"], recalls["class 5"] = 0.01, None
    lines = [" ".join(line.split()) for line in text(tables.class_table({"per_class": {"test": {"recall": recalls}}}))
             .splitlines()]  # fmt: skip
    assert lines[0] == "lowest recall among 10 classes (all of them: per_class in summary.json)"
    assert [line for line in lines if line.startswith("class ")] == [
        "class 3 1.0 %", "class 9 45.0 %", "class 8 50.0 %",
    ]  # fmt: skip
    assert any(line.startswith("means leave out 1 of 10 classes without samples: ") for line in lines)


def test_a_segmentation_shows_its_classes_by_name():
    classes = {"test": {"dice": {"background": 0.98, "edema": 0.6, "core": 0.4}}}
    metrics = {"dice": 0.5, "dice_1": 0.6, "dice_2": 0.4}
    summary = make_summary("fedavg", "segmentation", metrics, per_class=classes)
    assert "dice 1" not in text(tables.final_table(summary, "accuracy"))
    assert "dice 1" in text(tables.final_table({**summary, "per_class": {}}, "accuracy"))
    lines = [" ".join(line.split()) for line in text(tables.class_table(summary)).splitlines()]
    assert lines[0] == "Dice of every class"
    assert {"background 98.0 %", "edema 60.0 %", "core 40.0 %"} <= set(lines)


def test_downstream_table():
    rows = [
        {"set": "seen", "shots": 5, "accuracy": 0.5, "auc": 0.75},
        {"set": "unseen", "shots": "all", "accuracy": 1.0},
    ]
    result = {"task": "probe", "method": "local", "data": "captions", "networks": 5, "rows": rows}
    lines = [" ".join(line.split()) for line in text(tables.downstream_table(result)).splitlines()]
    assert lines[0] == "probe: local on captions, mean over 5 networks"
    assert "test set shots accuracy AUC" in lines
    assert "seen 5 50.0 % 75.0 %" in lines
    assert "unseen client all 100.0 %" in lines


def test_partition_table_lists_a_few_clients_and_the_totals():
    counts = np.arange(60).reshape(20, 3)
    statistics = PartitionStatistics(counts, ("a", "b", "c"), "iid")
    shown = text(tables.partition_table(statistics, limit=4))
    assert "16 more" in shown
    assert str(int(counts.sum())) in shown
    wide = PartitionStatistics(np.ones((2, 100), dtype=np.int64), tuple(f"class{i}" for i in range(100)), "iid")
    assert "class0" not in text(tables.partition_table(wide))


def test_the_partition_table_says_what_skew_is():
    counts = np.array([[6, 0], [1, 5]])
    statistics = PartitionStatistics(counts, ("a", "b"), "iid")
    shown = " ".join(text(tables.partition_table(statistics)).split())
    assert "share of a client's samples that would need another class to give it the class shares of all" in shown
    overall = counts.sum(0) / counts.sum()
    moved = [np.maximum(own - overall * own.sum(), 0).sum() / own.sum() for own in counts]
    np.testing.assert_allclose(statistics.skew, moved)


@pytest.mark.parametrize("name", ["validation_north", "id_north", "north", "balanced"])
def test_a_set_with_any_name_has_a_column(name):
    metrics = {"validation_accuracy": 0.1, f"{name}_accuracy": 0.2, "a_accuracy": 0.3, "mean_client_accuracy": 0.4}
    summary = make_summary("fedavg", "arrays", metrics, per_class={split: {} for split in ("validation", name, "a")})
    table = tables.final_table(summary, "accuracy")
    columns = dict(zip(table.header, zip(*table.rows, strict=True), strict=True))
    assert columns[name][0] == "20.0 %"
    assert columns["a"][0] == "30.0 %"
    assert not any("10.0 %" in cells for cells in columns.values())


# -- text table --------------------------------------------------------------------------------------------------------


LINKS = "[x](http://y.z) ![](p.png) <img src=q> [r]: http://y.z $a$ www.y.z <https://y.z> &lt;"
ODD = "a|b *c* _d_ <e> `f` \\g ± 50 % – {h}"
TABLE = Table(["", ODD], [[ODD, "1"], ["last", Text("2", "red")]], "Title", notes=["A note.", ODD], breaks=[1])


def render(table: Table, *, color: bool = False) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=color)
    console.print(table)
    return console.file.getvalue()


def test_markdown_is_read_back():
    table = Table.of_markdown(TABLE.markdown())
    assert table == Table(["", ODD], [[ODD, "1"], ["last", "2"]], notes=["A note.", ODD])
    linked = Table(["", LINKS], [[LINKS, LINKS]], LINKS, notes=[LINKS])
    assert Table.of_markdown(linked.markdown()) == dataclasses.replace(linked, title="")
    tokens = [token for block in MarkdownIt("gfm-like", {"linkify": False}).parse(linked.markdown())
              for token in block.children or []]  # fmt: skip
    assert {token.type for token in tokens} <= {"text", "text_special"}
    assert not re.search("http:| &lt;", linked.markdown())
    assert Table.of_markdown("# Title\n\n| a |\n") is None
    assert Table.of_markdown("| a | b |\n|---|---:|\n| 1 |\n") is None


def test_no_form_holds_control_characters():
    name = "a\x1b[2J\n\u202eb"
    table = Table(["", name], [[name, name]], name, notes=[name])
    for text in (table.markdown(), table.latex(), table.html(), render(table)):
        assert text.replace("\n", "").isprintable()
        assert text.count("x1b") >= 4


def test_latex_has_every_cell_and_says_the_notes_in_comments():
    lines = TABLE.latex().splitlines()
    assert lines[:4] == ["% Title", "% A note.", f"% {ODD}", r"\begin{tabular}{lr}"]
    assert r"last & 2 \\" in lines
    assert r"a|b *c* \_d\_ $<$e$>$ `f` \textbackslash{}g $\pm$ 50 \% -- \{h\} & 1 \\" in lines


def test_a_terminal_shows_the_title_in_one_line_and_a_line_between_parts():
    title = "a title that is longer than its table"
    lines = [
        line.strip() for line in render(Table(["x", "y"], [["a", "1"], ["b", "2"]], title, breaks=[1])).splitlines()
    ]
    assert lines[0] == title
    assert lines[lines.index("a   1") + 1] == ""
    bare = render(Table(["x", "y"], [["a", "1"]], bare=True))
    assert "x" not in bare
    assert "\x1b[1m" in render(Table(["x", "y"], [["a", "1"]], bold=True, bare=True), color=True)


def test_a_notebook_shows_all_parts():
    page = Reader(TABLE.html())
    assert page.unclosed == []
    assert page.text("th") == ["", ODD]
    assert page.text("strong") == ["Title"]
    assert {"last", "2", "1"} <= {*page.text("td")}
    assert page.text("p")[-1].startswith("A note.")
