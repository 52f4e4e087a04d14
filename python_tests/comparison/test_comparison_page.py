"""Tests of the report of a comparison: its table, curves with bands, and careful conclusions."""

import pytest

import fedkern
from fedkern.comparison import comparison_page
from fedkern.comparison.run_results import Result
from fedkern.errors import UserError
from python_tests.html_reader import Reader

TINY = {"data": "digits", "train_samples": 120, "clients": 3, "model": "mlp", "threads": 1, "grad_cam": 0,
        "local_steps": 2, "workers": 1, "rounds": 2, "progress": False}  # fmt: skip


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "x"
    return fedkern.compare(["fedavg", "fedprox"], seeds=2, target="accuracy=0.05", out=folder, **TINY)


def test_the_page_of_a_comparison(comparison):
    folder = comparison.folder
    assert comparison_page.holds_runs(folder)
    result = comparison_page.read_comparison(folder)
    assert [group.label for group in result.groups] == ["fedavg", "fedprox"]
    path = comparison_page.write_report(folder, result, commands={"fedavg": "python -m fedkern.run fedavg"})
    page = Reader(path.read_text())
    assert page.unclosed == []
    assert page.text("h1") == ["fedavg, fedprox on digits"]
    rows = comparison.result.text_table().rows
    assert all(cell in [*page.text("td"), *page.text("th")] for row in rows for cell in row if cell)
    assert "rounds to target" in page.text("th")
    assert all(text in page.text("p") for text in comparison.notes)
    sections = comparison_page.page(folder, result, {}).sections
    (chart,) = next(section for section in sections if section.name == "curves").blocks
    values = [[record["accuracy"] for record in run.records] for run in result.groups[0].runs.values()]
    means = [f"{50 * (a + b):.1f} %" for a, b in zip(*values, strict=True)]
    assert [row[1] for row in chart.tables[0].rows] == means
    assert page.charts >= {"curve-0", "final-0", "bytes", "time", "labels"}
    assert "mean and standard deviation over seeds" in page.text("text")
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert page.text("code") == ["python -m fedkern.run fedavg"]
    assert "fedprox_seed=1" in page.text("td")


def fake(low, high, mean=0.01, seeds=3):
    class Fake(Result):
        def __init__(self):
            self.figures = ["ood_accuracy"]

        @property
        def table(self):
            row = {"group": "a", "seeds": seeds, "ood_accuracy": 0.5, "ood_accuracy_std": 0.01}
            two = {"ood_accuracy_difference": mean, "ood_accuracy_low": low, "ood_accuracy_high": high}
            return [row, {**row, "group": "b", **two}]

    return Fake()


@pytest.mark.parametrize(
    ("low", "high", "opening", "told"),
    [
        (-0.01, 0.03, "No group can be told apart from a: every 95 % interval holds 0.", "cannot be told apart"),
        (0.005, 0.015, "1 of 1 differences from a have a 95 % interval without 0.", "b is higher than a"),
        (
            None,
            None,
            "With 3 seeds in the smallest group no difference can be told from chance.",
            "without an interval",
        ),
    ],
)
def test_the_headline_says_what_chance_leaves(low, high, opening, told):
    sentence, second = comparison_page.headline(fake(low, high))
    assert sentence == opening
    assert told in second
    assert second.startswith("Accuracy, out of distribution: ")


def test_two_seeds_show_no_difference():
    opening, told = comparison_page.headline(fake(0.005, 0.015, seeds=2))
    assert opening == "With 2 seeds in the smallest group no difference can be told from chance."
    assert told.endswith("(95 % interval +0.5 to +1.5, which two seeds can make narrow by accident).")


def test_a_single_group_is_not_compared():
    single = fake(None, None)
    type(single).table = [single.table[0]]
    assert comparison_page.headline(single) == [
        "One group, a, with Accuracy, out of distribution 50.0 ± 1.0 %: nothing is compared."
    ]


def test_damaged_and_incomplete_comparisons(tmp_path):
    (tmp_path / "comparison.csv").write_text("group,seed\na,0\n")
    with pytest.raises(UserError, match="it has no column 'folder'"):
        comparison_page.read_comparison(tmp_path)
    (tmp_path / "comparison.csv").write_text("group,folder\na,/nowhere/run\n")
    with pytest.raises(UserError, match="names the run in /nowhere/run, which is not there"):
        comparison_page.read_comparison(tmp_path)
    (tmp_path / "comparison.csv").write_text("group,folder\n")
    with pytest.raises(UserError, match="names no run"):
        comparison_page.read_comparison(tmp_path)
