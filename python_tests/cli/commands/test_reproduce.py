"""reproduce: a paper's table on the command line."""

import json

import pytest

from fedkern.cli.commands.reproduce import read_budget
from fedkern.errors import UserError
from fedkern.run import main

PAPER = """
title = "Tiny"
[[cells]]
table = "1"
name = "average"
command = "fedavg --data digits --train-samples 90 --clients 3 --model mlp --width 8 --grad-cam 0 --rounds 1"
figure = "accuracy"
published = 0.9
tolerance = 0.01
seeds = 1
minutes = 1
"""


@pytest.fixture(autouse=True)
def _paper(tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(PAPER)
    monkeypatch.delenv("FEDKERN_DATA_ROOT", raising=False)


def test_a_budget_of_nothing_writes_the_table(result, tmp_path):
    out, err = result("reproduce", "tiny.toml", "--budget", "0")
    assert "beyond the budget: average (about 1 min 00 s)" in err
    assert "1 not played, of 1 cells." in out
    assert sorted(path.name for path in (tmp_path / "reproductions/tiny").iterdir()) == [
        "report.html", "reproduction.csv", "reproduction.md",
    ]  # fmt: skip


def test_a_table_is_played_and_goes_on(result):
    flags = ("tiny.toml", "--workers", "1", "--out", "x")
    out, err = result("reproduce", *flags)
    assert "next: average" in err
    assert "1 undecided, of 1 cells." in out
    out, err = result("reproduce", *flags, "--json")
    assert err == ""
    (row,) = json.loads(out)["rows"]
    assert row["verdict"] == "undecided"
    assert 0 < row["ours"] <= 1
    assert result("reproduce", *flags, "--quiet")[0] == "x\n"
    assert "finished: average" in result("reproduce", *flags)[1]


def test_without_data_a_shipped_paper_says_so(result, tmp_path, monkeypatch):
    out, err = result("reproduce", "mcmahan2017", "--table", "1")
    assert err.count("no data here: 2NN IID B=10, 2NN non-IID B=10, 2NN IID B=inf and 2 more (") == 1
    assert "5 no data here, of 5 cells." in out
    assert out.count("data set ") == 1  # one reason, below the table
    monkeypatch.setenv("FEDKERN_DATA_ROOT", str(tmp_path / "nothing"))
    assert f"the data root {tmp_path / 'nothing'} is not a folder" in " ".join(
        result("reproduce", "mcmahan2017", "--json", "--out", "y")[0].split()
    )


@pytest.mark.parametrize(
    ("budget", "ending"),
    [
        ("0s", "2 not played, of 2 cells."),
        pytest.param("1h", "2 reproduced, of 2 cells.", marks=pytest.mark.exhaustive),
    ],
)
def test_the_example_is_a_table_that_comes_out(result, tmp_path, budget, ending):
    (tmp_path / "mine.toml").write_text(result("reproduce", "--example")[0])
    out, err = result("reproduce", "mine.toml", "--workers", "1", "--budget", budget)
    assert "next: FedAvg (0 of 3 runs finished)" in err
    assert ending in out


def test_refusals(fails, tmp_path):
    assert "needs a paper: " in fails("reproduce")
    assert 'Did you mean "mcmahan2017"?' in fails("reproduce", "mcmahan")
    assert 'Did you mean "average"?' in fails("reproduce", "tiny.toml", "--cells", "averge")
    assert 'no cell "nothing". Its cells are average.' in fails("reproduce", "tiny.toml", "--cells", "nothing")
    assert 'no table "2", but 1' in fails("reproduce", "tiny.toml", "--table", "2")
    assert "--budget must be a time" in fails("reproduce", "tiny.toml", "--budget", "long")
    assert '"--lr"' in fails("reproduce", "tiny.toml", "--lr", "0.1")
    (tmp_path / "file").write_text("")
    assert "is no folder" in fails("reproduce", "tiny.toml", "--out", "file")
    assert not (tmp_path / "reproductions").exists()


def test_a_failed_cell_is_told(capsys, tmp_path):
    (tmp_path / "tiny.toml").write_text(PAPER.replace("--rounds 1", "--rounds 1 --lr 1e30"))
    assert main(["reproduce", "tiny.toml", "--workers", "1"]) == 1
    out, err = capsys.readouterr()
    assert "error: average: " in err
    assert "not played: " in out


def test_help(result):
    out, _ = result("reproduce", "--help")
    assert "NAME|FILE.toml" in out
    assert "--budget" in out


def test_budgets():
    assert [read_budget(text) for text in ("2h", "1.5h", "90m", "3 min", "30s", "0")] == [7200, 5400, 5400, 180, 30, 0]
    for text in ("", "2", "-1h", "h", "1d"):
        with pytest.raises(UserError, match="--budget must be a time"):
            read_budget(text)
