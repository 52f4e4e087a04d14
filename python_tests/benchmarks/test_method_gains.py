"""The table of where each method fits: paired gains, what is not played, and settings in order of preference."""

import json
import math

import pytest

from benchmarks import method_gains, page
from benchmarks.method_gains import Contest, Sample, Setting, Tool, reproduced, studied
from fedkern.comparison import published


def sample(*values: float, scale: float = 100, made: str = "`abc1234`, 2026-01-02") -> Sample:
    return Sample(dict(enumerate(values)), scale, made)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes result files that are read instead of the repository's."""
    monkeypatch.setattr(method_gains, "RESULTS", tmp_path)
    monkeypatch.setattr(method_gains, "load", lambda name: page.load.__wrapped__(name, tmp_path))

    def write(name: str, **content: object) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    return write


def test_a_gain_is_the_paired_difference_with_students_interval():
    told = Contest(sample(0.5, 0.75, 0.5), sample(0.25, 0.25, 0.25), "FedDyn").gain()
    half = 4.302652729749464 * (1 / math.sqrt(48)) / math.sqrt(3)  # t of 0.975 with two degrees of freedom
    low, high = (f"{100 * (1 / 3 + end):+.1f}".replace("-", "−") for end in (-half, half))
    assert told == f"+33.3 [{low}, {high}], FedDyn"


def test_seeds_that_one_of_both_lacks_do_not_count():
    assert Contest(sample(0.5, 0.9), sample(0.25), "").gain() == "+25.0, one seed"


def test_losses_have_two_digits_and_no_per_cent():
    contest = Contest(sample(-3.5, scale=1), sample(-3.25, scale=1), "FedProx", "one stage")
    assert contest.gain() == "one stage: −0.25, one seed, FedProx"


def test_what_is_not_played_says_so():
    contest = Contest(sample(0.5), None, "FedProx", "one stage")
    assert contest.gain() == "one stage: not played, FedProx"
    assert contest.made == []


def test_the_first_setting_with_most_results_is_shown():
    absent, there = Contest(None, None, ""), Contest(sample(0.5), sample(0.4), "")
    settings = [Setting("new", absent, absent), Setting("old", there, absent)]
    tool = Tool("A", "a.md", "", settings, "", "")
    assert tool.setting.cells() == ["old", "+10.0, one seed", "", "not played", "`abc1234`, 2026-01-02"]
    tool = Tool("A", "a.md", "", [Setting("new", absent, there), settings[1]], "", "")
    assert tool.setting.figure == "new"
    assert Tool("A", "a.md", "", settings[:1], "", "").setting.figure == "new"
    whole = Setting("old", there, there)  # a rival of the older study is not left out for half of a newer one
    assert Tool("A", "a.md", "", [Setting("new", there, absent), whole], "", "").setting.figure == "old"


def test_a_reproduced_cell_is_read_by_seed(results):
    assert reproduced("mine", "a") is None  # there is no file
    row = {"name": "a", "figure": "accuracy", "ours": 0.6, "values": "0=0.5 3=0.7", "fedkern": "0.1.0 abc1234"}
    loss = {**row, "name": "b", "figure": "worst_client_loss", "date": "2026-01-02"}
    results("reproduction_mine", rows=[row, loss, {**row, "name": "c", "ours": None}])
    assert reproduced("mine", "a") == Sample({0: 0.5, 3: 0.7}, 100, "`abc1234`, no day")
    assert reproduced("mine", "b") == Sample({0: -0.5, 3: -0.7}, 1, "`abc1234`, 2026-01-02")
    assert reproduced("mine", "c") is None
    assert reproduced("mine", "d") is None


def test_a_study_is_read_by_seed(results):
    content = {"versions": {"commit": "unrecorded"}, "a": {"runs": [{"accuracy": 0.5}]}, "b": [0.25, 0.5]}
    results("study", **content)
    assert studied("study", "a", "runs", figure="accuracy") == Sample({0: 0.5}, 100, "unrecorded")
    results("study", **{**content, "versions": {"commit": "abc1234"}})
    assert studied("study", "b") == Sample({0: 0.25, 1: 0.5}, 100, "`abc1234`, no day")


def test_cells_are_those_of_the_papers(monkeypatch):
    asked = []
    monkeypatch.setattr(method_gains, "reproduced", lambda paper, cell: asked.append((paper, cell)))
    method_gains.tools()
    assert {paper for paper, _ in asked} == {"fedgid", "fusefl", "fedlpfm", "fediod", "feddra"}
    for paper, cell in asked:
        if paper in published.names():
            published.read(paper).find(cell)


def test_all_five_methods_are_in_both_tables():
    for lines in (method_gains.in_full(), method_gains.in_short()):
        names = [line.split("[")[1].split("]")[0] for line in lines if line.startswith("| [")]
        assert names == ["FedGID", "FuseFL", "Fed-LPFM", "FedIOD", "FedDRA"]
        assert len({line.count("|") for line in lines[2:]}) == 1
