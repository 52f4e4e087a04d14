"""import: a CSV of somebody's results as recorded runs."""

import json
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "results.csv"
COLUMNS = "method=algo,seed,round=epoch,accuracy=test_acc"
FLAGS = ("--columns", COLUMNS, "--percent", "accuracy", "--out", "runs")
TABLE = """\
algo,seed,epoch,test_acc
a,0,1,50
a,0,2,70
a,1,2,80
a,1,1,60
"""


@pytest.fixture
def write(tmp_path):
    def write_table(text: str) -> str:
        (tmp_path / "table.csv").write_text(text)
        return "table.csv"

    return write_table


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_table_becomes_runs_that_are_compared(result, tmp_path):
    out, _ = result("import", str(EXAMPLE), *FLAGS)
    assert out.splitlines() == [f"6 runs from {EXAMPLE} in runs", "compare them: python -m fedkern.run compare runs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert [record["accuracy"] for record in records(tmp_path / "runs/FedAvg_seed=0")] == [
        0.1914, 0.3457, 0.6, 0.7714, 0.8086,
    ]  # fmt: skip
    out, _ = result("compare", "runs", "--target", "accuracy=0.7", "--json")
    averaged, adam = sorted(json.loads(out)["table"], key=lambda group: group["accuracy"])
    assert averaged["group"] == "FedAvg (own code)"
    assert adam["accuracy"] == pytest.approx((0.8343 + 0.8314 + 0.7486) / 3)
    assert (adam["reached"], adam["rounds_to_target"]) == (3, pytest.approx(10 / 3))


def test_rows_stand_in_any_order_and_cells_may_be_empty(result, write, tmp_path):
    text = "\ufeffepoch;who;seed;acc;loss;up\n2;a b/c;3.0;70 %;;8\n\n1;a b/c;3;;2.5;\n0;a b/c;3;nan;3;0\n"
    columns = "method=who,seed,round=epoch,accuracy=acc,loss,bytes_up=up"
    folder = Path(json.loads(result("import", write(text), "--columns", columns, "--json")[0])["runs"][0])
    assert folder.parent == Path("runs/table")
    assert [record.get("accuracy", "") for record in records(tmp_path / folder)] == [None, "", 0.7]
    assert [record.get("loss", "") for record in records(tmp_path / folder)] == [3, 2.5, ""]
    assert [record["bytes_up"] for record in records(tmp_path / folder)] == [0, 0, 8]
    assert {record["seconds"] for record in records(tmp_path / folder)} == {None}


def test_a_row_may_be_a_finished_run(result, write, tmp_path):
    flags = ("--columns", "seed, f1 = F", "--method", "mine", "--framework", "flwr", "--better", "max", "--out", "runs")
    result("import", write("seed\tF\n0\t0.5\n1\t0.75\n"), *flags)
    assert [records(tmp_path / f"runs/mine_seed={seed}")[0]["f1"] for seed in (0, 1)] == [0.5, 0.75]
    assert "mine (flwr)" in result("compare", "runs", "--quiet", "--out", "c")[0] + Path("c/comparison.csv").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "No row"),
        (TABLE.splitlines()[0], "no line of results is below the names of the columns"),
        (TABLE.replace("test_acc", "acc"), 'no column "test_acc" for accuracy'),
        (TABLE.replace("algo", "seed"), '2 columns "seed" for seed'),
        (TABLE + "a,2,1\n", "line 6: it has 3 values, and the first line has 4"),
        (TABLE + "a,x,1,5\n", 'line 6: seed must be a whole number from 0 on, not "x"'),
        (TABLE + "a,2,1.5,5\n", 'line 6: round must be a whole number from 0 on, not "1.5"'),
        (TABLE + "a,2,1,high\n", 'line 6: accuracy must be a number, not "high"'),
        (TABLE + "a,2,1,sNaN%\n", 'line 6: accuracy must be a number, not "sNaN%"'),
        (TABLE + "a,2,1,900\n", "line 6: accuracy must be a fraction from 0 to 1, not 9.0"),
        (TABLE + ",2,1,9\n", "line 6: the method must be a text of one line"),
        (TABLE + "a,1,1,9\n", "line 6: method, seed and round are those of line 5"),
        (TABLE + 'a,2,1,"9\n', "line 6: unexpected end of data"),
        (TABLE[:24] + "\na,0,1,0.5\na,0,2,0.7\n", "no accuracy is above 1 %: leave out --percent accuracy"),
        (TABLE + "a,2,1,\n", "no line of a, seed 2, has the main figure, accuracy"),
    ],
)
def test_mistakes_in_a_table_leave_nothing(fails, write, tmp_path, text, said):
    assert said.replace("No row", "no column") in fails("import", write(text), *FLAGS)
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_all_mistakes_are_told_at_once(fails, write):
    said = fails("import", write(TABLE + "a,x,y,z\na,1\na,0,y,1\n"), *FLAGS)
    assert said.startswith("error: table.csv cannot be imported: line 6: seed must")
    assert "; line 6: round must" in said
    assert "; line 6: accuracy must" in said
    assert "; line 7: it has 2 values" in said
    assert said.endswith('; line 8: round must be a whole number from 0 on, not "y".')


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "needs FILE.csv and --columns"),
        (("t.csv",), "needs FILE.csv and --columns"),
        (("t.csv", "--columns", "a=b=c,=d"), '--columns needs the form NAME=COLUMN,NAME=COLUMN, got "=d"'),
        (("t.csv", "--columns", "seed,seed"), '--columns gives "seed" twice'),
        (("t.csv", "--columns", "seed", "--better", "low"), '--better must be max or min, not "low"'),
        (("t.csv", "--columns", "seed"), "t.csv cannot be read: No such file"),
        (("table.csv", "--columns", "method=algo,accuracy=test_acc"), "No column holds the seed"),
        (("table.csv", "--columns", "seed,accuracy=test_acc"), "The method is a column, method=COLUMN, or"),
        (("table.csv", "--columns", COLUMNS, "--method", "x"), "The method is a column, method=COLUMN, or"),
        (("table.csv", "--columns", "method=algo,seed"), "No column holds a figure"),
        (("table.csv", "--columns", COLUMNS, "--percent", "f1"), "--percent f1: it is none of the figures accuracy"),
        (("table.csv", "--columns", COLUMNS, "--percent", "test_acc"), "Name the figure, not its column."),
        (("table.csv", "--columns", "algo=method,seed,test_acc=accuracy"), "The column comes second: method=algo."),
        (("table.csv", "--columns", "method=algo,seed=sed"), 'for seed (Did you mean "seed"?): its columns are algo, '),
        (("table.csv", "--columns", COLUMNS), "not 50.0 (a percentage: --percent accuracy)"),
        (("table.csv", "--columns", "method=algo,seed,round=epoch,hits=test_acc"), "give --better max or --better min"),
        (("table.csv", "--columns", "method=algo,seed,accuracy=test_acc", "--percent", "accuracy"), "round=COLUMN"),
        (("table.csv", *FLAGS[:-1], "full"), "full is there already: name a new folder with --out"),
        (("table.csv", *FLAGS[:-1], "."), ". is there already"),
        (("table.csv", *FLAGS, "--method", "x"), "give one of the two"),
    ],
)
def test_mistakes_of_the_command(fails, write, tmp_path, words, said):
    write(TABLE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert said in fails("import", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "table.csv"]
