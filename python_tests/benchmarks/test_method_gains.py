"""Tests of the table of where each method fits: paired gains, missing runs, and the preferred settings."""

import json
import math

import pytest

from benchmarks import charts, method_gains, page, pages
from benchmarks.method_gains import Contest, Sample, read_sample
from benchmarks.studies.run import read_study


def sample(*values: float, scale: float = 100, made: str = "`abc1234`, 2026-01-02") -> Sample:
    return Sample(dict(enumerate(values)), scale, made)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Write result files that are read instead of the repository's."""
    monkeypatch.setattr(method_gains, "RESULTS", tmp_path)
    rows = lambda study: {row["name"]: row for row in page.load.__wrapped__(study, tmp_path)["rows"]}  # noqa: E731
    monkeypatch.setattr(method_gains, "read_rows", rows)

    def write(name: str, **content: object) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    return write


def contest(own, baseline):
    return Contest("digits", "as published", own, "FedDyn", baseline)


def test_a_gain_is_the_paired_difference_with_students_interval():
    cells = contest(sample(0.5, 0.75, 0.5), sample(0.25, 0.25, 0.25)).cells()
    half = 4.302652729749464 * (1 / math.sqrt(48)) / math.sqrt(3)  # t of 0.975 with two degrees of freedom
    low, high = (f"{100 * (1 / 3 + end):+.1f}".replace("-", "−") for end in (-half, half))
    assert cells == ["digits", "as published", "FedDyn", f"+33.3 [{low}, {high}]", "`abc1234`, 2026-01-02"]


def test_seeds_that_one_of_both_lacks_do_not_count():
    assert contest(sample(0.5, 0.75, 0.9), sample(0.25, 0.5)).ends() == (25, 25, 25)


def test_losses_have_two_digits():
    assert contest(sample(-3.5, -3.5, scale=1), sample(-3.25, -3.25, scale=1)).cells()[3] == "−0.25 [−0.25, −0.25]"


def test_what_is_not_played_is_left_out(monkeypatch):
    assert contest(sample(0.5), None).commits == []
    monkeypatch.setattr(method_gains, "read_sample", lambda paper, cell: None)
    assert len(method_gains.differences()) == 2


def test_a_reproduced_cell_is_read_by_seed(results):
    assert read_sample("mine", "a") is None  # there is no file
    row = {"name": "a", "figure": "accuracy", "ours": 0.6, "values": "0=0.5 3=0.7", "fedkern": "0.1.0 abc1234"}
    loss = {**row, "name": "b", "figure": "worst_client_loss", "date": "2026-01-02"}
    results("mine", rows=[row, loss, {**row, "name": "c", "ours": None}])
    assert read_sample("mine", "a") == Sample({0: 0.5, 3: 0.7}, 100, "`abc1234`, no day")
    assert read_sample("mine", "b") == Sample({0: -0.5, 3: -0.7}, 1, "`abc1234`, 2026-01-02")
    assert read_sample("mine", "c") is None
    assert read_sample("mine", "d") is None


def test_cells_are_those_of_the_papers(monkeypatch):
    asked = []
    monkeypatch.setattr(method_gains, "read_sample", lambda paper, cell: asked.append((paper, cell)))
    method_gains.tools()
    assert {paper for paper, _ in asked} == {"fedgid", "fusefl", "fedlpfm", "fediod", "feddra"}
    for paper, cell in asked:
        read_study(paper).find(cell)


def test_all_five_methods_are_in_both_tables():
    for lines in (method_gains.in_use(), method_gains.differences()):
        names = dict.fromkeys(line.split("[")[1].split("]")[0] for line in lines if line.startswith("| ["))
        assert [*names] == ["FedGID", "FuseFL", "Fed-LPFM", "FedIOD", "FedDRA"]
        assert len({line.count("|") for line in lines}) == 1


def test_a_chart_is_found_stale(tmp_path):
    (tmp_path / "docs/charts").mkdir(parents=True)
    drawn = charts.forest(method_gains.tools()[1])
    (tmp_path / drawn.path).write_text(drawn.draw())
    assert drawn.name not in [chart.name for chart in pages.stale_charts(tmp_path)]
    (tmp_path / drawn.path).write_text(drawn.draw().replace(drawn.mark, 'data-results="0"'))
    assert pages.stale_charts(tmp_path) == charts.all_charts()
    assert pages.stale_charts() == []
