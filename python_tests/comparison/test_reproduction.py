"""Tests of playing a paper's cells: budgets, sweeps, earlier runs, shared runs, missing data."""

import csv
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedkern import record
from fedkern.cli.command_parser import parse_words
from fedkern.cli.commands import reproduce
from fedkern.comparison import cell_runner, published
from fedkern.comparison.reproduction import CSV, MARKDOWN, Deadline, OutOfTime, Reproduction
from fedkern.errors import UserError
from fedkern.files.folder_lock import FolderLock

DIGITS = (
    "--data digits --train-samples 90 --clients 3 --model mlp --width 8 --threads 1 --grad-cam 0 --local-steps 2 "
    "--rounds 2"
)
PAPER = f"""
title = "Tiny"
[words]
digits = "{DIGITS}"
[defaults]
table = "1"
figure = "accuracy"
smaller = "digits"
seeds = 2

[[cells]]
name = "average"
command = "fedavg {{digits}}"
published = 0.9
sweep = ["lr=0.0001,0.1"]
minutes = 3

[[cells]]
name = "proximal"
command = "fedprox {{digits}} --lr 0.1"
published = 0.95
baseline = "average"
minutes = 2

[[cells]]
name = "loss"
table = "2"
command = "fedprox {{digits}} --lr 0.1"
figure = "loss"
seeds = 3
minutes = 1
"""


@pytest.fixture
def starts(monkeypatch):
    """Return the list of started runs: method, learning rate and seed."""
    begun, real = [], cell_runner.run

    def run(config, **options):
        begun.append((config.method, config.lr, config.seed))
        return real(config, **options)

    monkeypatch.setattr(cell_runner, "run", run)
    return begun


def end_at_look(number, monkeypatch):
    """Let the budget's time end at the ``number``-th look at the clock."""
    looks, check = [], Deadline.check

    def out_of_time(deadline):
        looks.append(deadline)
        if len(looks) == number:
            raise OutOfTime
        check(deadline)

    monkeypatch.setattr(Deadline, "check", out_of_time)


@pytest.fixture
def paper(tmp_path):
    def make_reproduction(text: str = PAPER, *flags: str, budget: float | None = None) -> Reproduction:
        path = tmp_path / "tiny.toml"
        path.write_text(text)
        request = parse_words(["reproduce", str(path), "--workers", "1", *flags])
        return Reproduction(
            published.load_paper(str(path)),
            tmp_path / "out",
            lambda words: reproduce.command_of(request, words),
            budget=budget,
        )

    return make_reproduction


def verdicts(made: Reproduction) -> dict[str, str]:
    return {row.cell.name: row.verdict.kind for row in made.rows()}


def test_cells_are_played_once_and_the_best_point_with_every_seed(paper, starts):
    made = paper()
    cells, lines = made.plan(made.select())
    assert [cell.name for cell in cells] == ["loss", "proximal", "average"]  # the dearest last
    assert lines[0] == "next: loss (0 of 3 runs finished, about 1 min 00 s left)"
    made.play(cells)
    assert not made.failures
    assert starts == [
        *(("fedprox", 0.1, seed) for seed in (0, 1, 2)),  # those of "proximal" are among these
        ("fedavg", 0.0001, 0), ("fedavg", 0.1, 0), ("fedavg", 0.1, 1),
    ]  # fmt: skip
    found = verdicts(made)
    assert found["average"] == "smaller scale: baseline"
    assert found["loss"] == "nothing published"
    again = paper()
    assert again.plan(again.select())[0] == []
    assert verdicts(again) == found
    rows = list(csv.DictReader((made.out / CSV).read_text().splitlines()))
    assert [row["name"] for row in rows] == ["average", "proximal", "loss"]
    assert "lr 0.1: " in rows[0]["swept"]
    assert rows[0]["swept"].endswith("(chosen)")
    assert 0 < float(rows[2]["bytes_up"]) == pytest.approx(float(rows[2]["bytes"]) / 2)  # FedProx's bytes, each way
    assert float(rows[1]["gap"]) == pytest.approx(float(rows[1]["ours"]) - float(rows[0]["ours"]))
    text = (made.out / MARKDOWN).read_text()
    assert text.startswith("# Tiny\n")
    assert "average, smaller scale: digits." in text
    assert "Tiny" in (made.out / "report.html").read_text()
    moments = (datetime(2026, 1, 2, 12, tzinfo=UTC), datetime(2026, 1, 3, 12, tzinfo=UTC))
    for path, moment in zip(sorted(Path(made.rows()[1].folder).glob("*/summary.json")), moments, strict=False):
        os.utime(path, (moment.timestamp(),) * 2)
    _, proximal, repeated = (row.values() for row in made.rows())
    assert proximal["bytes"] == repeated["bytes"] > 0
    assert proximal["date"] == "2026-01-03"  # of its last run


def test_a_budget_leaves_the_dearest_out(paper, starts):
    made, told = paper(budget=130), []
    made.tell = told.append
    cells, lines = made.plan(made.select())
    assert lines[2] == "next: average (0 of 3 runs finished, about 3 min 00 s left)"
    made.play(cells)
    assert [method for method, _, _ in starts] == ["fedprox"] * 3  # what cells share costs nothing the second time
    assert told[-1] == "beyond the budget: average (about 3 min 00 s)"
    assert verdicts(made) == {"average": "not played", "proximal": "undecided", "loss": "nothing published"}
    unpaid = paper(budget=0)
    unpaid.play(unpaid.plan(unpaid.select(["average"]))[0])
    assert len(starts) == 3


def test_damaged_records_are_a_failure_of_their_cell_alone(paper):
    made = paper(PAPER.replace('figure = "loss"', 'figure = "rounds"\ntarget = "accuracy=0.99"'))
    run = made.jobs["loss"].folder_of(0, made.jobs["loss"].points[0])
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{\n{}\n")
    made.write()
    assert "metrics.jsonl, line 1, is damaged" in made.failures["loss"]
    assert [(row.cell.name, row.verdict.kind) for row in made.rows() if row.verdict.detail] == [("loss", "not played")]
    assert "is damaged" in (made.out / MARKDOWN).read_text()


def test_cells_are_chosen_by_name_pattern_and_table(paper):
    made = paper()
    assert [cell.name for cell in made.select(["p*", "loss"])] == ["proximal", "loss"]
    assert [cell.name for cell in made.select(table="1")] == ["average", "proximal"]
    for names, table, said in (
        (["averge"], None, 'Did you mean "average"'),
        ([], "3", 'no table "3", but 1, 2'),
        (["loss"], "1", 'table "1" of tiny has no cell loss'),
    ):
        with pytest.raises(UserError, match=said):
            made.select(names, table)


def test_a_run_stops_between_rounds_has_its_curve_on_the_page_and_goes_on(paper, starts, monkeypatch):
    text = PAPER.replace('figure = "loss"', 'figure = "rounds"\ntarget = "accuracy=0.99"')
    made, check = paper(text, budget=1000), Deadline.check
    end_at_look(3, monkeypatch)  # before the cell, and before the second round of its first run
    made.play(made.select(["loss"]))
    assert starts == [("fedprox", 0.1, 0)]
    assert not made.failures
    (row,) = [row for row in made.rows() if row.cell.name == "loss"]
    assert row.verdict.kind == "not played"
    assert list(row.curves) == ["seed 0"]
    made.write()
    page = (made.out / "report.html").read_text()
    assert "Loss: accuracy, over the rounds. seed 0: " in page
    assert "target 99.0 %" in page
    monkeypatch.setattr(Deadline, "check", check)
    again = paper(text, budget=1000)
    again.play(again.select(["loss"]))
    assert starts[1:] == [("fedprox", 0.1, seed) for seed in (0, 1, 2)]
    assert verdicts(again)["loss"] == "nothing published"


def test_a_cell_that_another_process_plays_is_left_to_it(paper, starts):
    made = paper()
    job = made.jobs["average"]
    job.folder.mkdir(parents=True)
    lines = []
    made.tell = lines.append
    with FolderLock(job.folder):
        made.play(made.select(["average", "loss"]))
    assert {method for method, _, _ in starts} == {"fedprox"}
    assert "  another process plays it" in lines
    assert verdicts(made)["average"] == "not played"


def test_a_point_that_fails_is_not_played_again(paper, starts):
    made = paper(PAPER.replace("lr=0.0001,0.1", "lr=1e30,0.1"))
    made.play(made.select(["average"]))
    assert starts == [("fedavg", 1e30, 0), ("fedavg", 0.1, 0), ("fedavg", 0.1, 1)]
    assert not made.failures
    (row, *_) = made.rows()
    assert row.outcome.effect.startswith("lr 1e+30: failed; lr 0.1: ")
    assert paper(PAPER.replace("lr=0.0001,0.1", "lr=1e30,0.1")).plan(made.select(["average"]))[0] == []


def test_points_that_all_fail_alike_are_played_again(paper, monkeypatch):
    made = paper()
    with monkeypatch.context() as patch:
        patch.setattr(cell_runner, "run", lambda config, **more: (_ for _ in ()).throw(UserError("no such package.")))
        made.play(made.select(["average"]))
    assert made.failures == {"average": "no such package."}
    assert not list(made.out.rglob("*.failed"))
    again = paper()
    assert again.jobs["average"].runs_left
    again.play(again.select(["average"]))
    assert verdicts(again)["average"] == "smaller scale: baseline"


def test_a_better_point_is_played_with_every_seed(paper, starts):
    made = paper()
    made.play(made.select(["average"]))
    swept = PAPER.replace("lr=0.0001,0.1", "lr=0.0001,0.1,0.3")
    later = paper(swept)
    assert (later.jobs["average"].runs_left, later.jobs["average"].total) == (2, 4)
    later.play(later.select(["average"]))
    best = later.jobs["average"].best_point()
    assert not later.jobs["average"].runs_left
    assert [seed for seed, run in later.jobs["average"].runs(best).items() if run] == [0, 1]
    assert starts[3][1] == 0.3


def test_a_cell_that_fails_leaves_the_others(paper):
    text = PAPER.replace('fedprox {digits} --lr 0.1"\npublished', 'fedprox {digits} --lr 1e30"\npublished')
    made = paper(text.replace('figure = "loss"', 'figure = "accurcy"'))
    made.play(made.plan(made.select())[0])
    assert made.failures.keys() == {"proximal", "loss"}
    assert 'no figure "accurcy"' in made.failures["loss"]
    assert verdicts(made) == {"average": "smaller scale: baseline", "proximal": "not played", "loss": "not played"}
    assert "proximal" in (made.out / MARKDOWN).read_text()


BEFORE = f"""
[[before]]
name = "teachers"
command = "ensemble {DIGITS.replace(" --local-steps 2 --rounds 2", " --local-epochs 1")}"
minutes = 2

[[cells]]
table = "1"
name = "students"
command = "ensemble {DIGITS.replace(" --local-steps 2 --rounds 2", " --local-epochs 1")} --teachers {{before}}"
figure = "accuracy"
seeds = 2
before = "teachers"
minutes = 1
"""


def test_what_is_run_before_is_played_for_every_seed(paper, starts):
    made = paper(BEFORE)
    assert made.plan(made.select())[1] == ["next: students (0 of 2 runs finished, about 3 min 00 s left)"]
    made.play(made.select())
    assert not made.failures
    assert [seed for _, _, seed in starts] == [0, 1, 0, 1]
    job = made.jobs["students"]
    for seed in (0, 1):
        config = job.runner.make(job.points[0], seed)
        assert config.teachers == str((made.out / job.before.folder.name / f"ensemble_seed={seed}").absolute())
    assert paper(BEFORE).plan(made.select())[0] == []


def test_a_run_beforehand_that_fails_ends_the_cell(paper, monkeypatch):
    real = cell_runner.run

    def run(config, **options):
        if config.seed == 1:
            raise UserError("seed 1 fails.")
        return real(config, **options)

    monkeypatch.setattr(cell_runner, "run", run)
    made = paper(BEFORE)
    made.play(made.select())
    assert made.failures == {"students": "teachers: ensemble, seed 1: seed 1 fails."}


def test_cells_without_data_are_said_beforehand(paper):
    text = PAPER.replace("fedavg {digits}", "fedavg --data mnist --clients 3")
    made = paper(text.replace("fedprox {digits}", "fedprox {digits} --plugin nothing.py", 1))
    cells, lines = made.plan(made.select())
    assert [cell.name for cell in cells] == ["loss"]
    assert lines[0].startswith('no data here: average (data set "mnist" is read from files')
    assert lines[1].startswith("no data here: proximal (nothing.py is not beside")
    assert verdicts(made) == {"average": "no data here", "proximal": "no data here", "loss": "not played"}


def test_data_that_cannot_be_cut_so_are_no_reason_for_other_cells(paper):
    made = paper(PAPER.replace("fedavg {digits}", "fedavg {digits} --train-samples 90000"))
    made.plan(made.select(["loss"]))
    assert not made.absent  # of a cell that was not requested
    made.plan(made.select())
    assert list(made.absent) == ["average"]
    assert "90000" in made.absent["average"] or "90,000" in made.absent["average"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--seed 1", "its command has --seed: leave it out, as the key seeds gives the seeds"),
        ("--out x", "its command has --out"),
        ("--data-root x", "its command has --data-root"),
        ("--resume x", "its command has --resume"),
        ("--lr -1", "--lr"),
    ],
)
def test_a_command_that_is_no_cell_is_refused(paper, flag, said):
    with pytest.raises(UserError, match='cell "average": ') as error:
        paper(PAPER.replace("fedavg {digits}", f"fedavg {{digits}} {flag}"))
    assert said in str(error.value)


def test_mistakes_of_commands_and_of_keys_are_told_together(paper):
    text = PAPER.replace("fedavg {digits}", "fedavg {digit}").replace("fedprox {digits} --lr 0.1", "fedprx")
    with pytest.raises(UserError, match=r"tiny\.toml has 4 mistakes: ") as error:
        paper(text + 'sweeep = ["lr=1,2"]\n')
    for said in (
        'cell "loss": there is no key "sweeep"', 'cell "average": "{digit}" stands', 'cell "proximal": Unknown m',
        'cell "loss": Unknown m',
    ):  # fmt: skip
        assert said in str(error.value)


RECORDED = """
[[cells]]
name = "loop"
runs = "loop*"
published = "50 %"
baseline = "old"

[[cells]]
name = "old"
runs = ["old/0", "old/1"]
published = 0.4
tolerance = 0.5
"""


def record_runs(folder, accuracies, name="{}", **options):
    for seed, accuracy in enumerate(accuracies):
        with record(folder / name.format(seed), method="loop", seed=seed, **options) as run:
            run.round(1, accuracy=accuracy / 2, seconds=2)
            run.round(2, accuracy=accuracy, seconds=3, bytes_up=7)


def test_recorded_runs_are_judged_as_played_ones(paper, tmp_path):
    labels = {"test_labels": [0, 1]}
    record_runs(tmp_path, (0.49, 0.5, 0.51), "loop{}", framework="flower", **labels)
    record_runs(tmp_path / "old", (0.39, 0.4), **labels)
    made = paper(RECORDED)
    assert made.plan(made.select()) == ([], ["recorded: loop (3 runs)", "recorded: old (2 runs)"])
    loop, old = made.rows()
    assert (str(loop.verdict), str(old.verdict)) == ("undecided: ± 2.5 % is wider than ± 2.0 %", "reproduced")
    assert loop.verdict.ours.mean == pytest.approx(0.5)
    assert loop.verdict.gap.mean == pytest.approx(0.1)
    assert loop.verdict.gap.high - loop.verdict.gap.low < 1e-9  # over the two seeds that both have
    values = loop.values()
    assert (values["figure"], values["values"]) == ("accuracy", "0=0.49 1=0.5 2=0.51")
    assert (values["seconds"], values["bytes_up"], values["fedkern"], values["folder"]) == (15, 7, "", "loop*")
    assert values["recorded"] == "loop (flower)"
    made.write()
    text = (made.out / MARKDOWN).read_text()
    assert "Recorded runs, not played by this command: loop (loop (flower)); old (loop (own code))." in text
    assert "Played with" not in text
    assert "recorded runs: loop*" in (made.out / "report.html").read_text()
    assert not made.failures


def test_runs_of_other_test_labels_are_not_paired(paper, tmp_path):
    record_runs(tmp_path, (0.5, 0.5), "loop{}", test_labels=[0, 1])
    record_runs(tmp_path / "old", (0.4, 0.4), test_labels=[1, 0])
    loop, *_ = paper(RECORDED.replace('baseline = "old"', 'baseline = "old"\nsmaller = "digits"')).rows()
    assert str(loop.verdict) == "undecided: it shares no seed with its baseline"
    assert loop.notes == ["Not paired with old, as the test labels differ: loop."]
    (tmp_path / "loop0").rename(tmp_path / "other0")
    loop, *_ = paper(RECORDED.replace(', "old/1"', "")).rows()
    assert loop.verdict.gap is None
    assert loop.notes == ["loop is not compared with old, as they have no seed in common."]


def test_a_played_cell_is_paired_with_recorded_runs(paper, tmp_path):
    record_runs(tmp_path, (0.5, 0.5), "loop{}")
    cell = f"""
[[cells]]
name = "loop"
runs = "loop*"
[[cells]]
name = "played"
command = "fedavg {DIGITS}"
target = "accuracy=0.01"
[[cells]]
name = "compared"
command = "fedavg {DIGITS}"
seeds = [1]
baseline = "loop"
"""
    made = paper(cell)
    made.play(made.select(["compared"]))
    loop, played, compared = made.rows()
    assert (loop.verdict.kind, played.verdict.detail) == ("nothing published", "1 of 3 runs finished")
    assert compared.verdict.gap.mean == pytest.approx(compared.verdict.ours.mean - 0.5)
    assert compared.notes == [
        "Nothing shows that the test labels are those of loop, as a hash of them is missing: compared."
    ]


def test_recorded_runs_that_make_no_cell_are_told(paper, tmp_path):
    made = paper(RECORDED)
    assert [row.verdict.kind for row in made.rows()] == ["no data here", "no data here"]
    assert made.absent["loop"] == f"there is no folder {tmp_path}/loop*."
    record_runs(tmp_path, (0.5, 0.5), "loop{}")
    record_runs(tmp_path, (0.5,), "loop-{}", settings={"lr": 0.1})
    (tmp_path / "old/0").mkdir(parents=True)
    (tmp_path / "old/1").mkdir()
    made = paper(RECORDED)
    assert made.failures["loop"] == (
        "its runs are of several methods or settings (loop (own code) lr=0.1, loop (own code) lr=unset): name those of "
        "one."
    )
    assert "old/0" in made.failures["old"]
    assert [row.verdict.kind for row in made.rows()] == ["not played", "not played"]


def test_a_main_figure_that_is_no_share_has_to_be_named(paper, tmp_path):
    for seed in range(2):
        with record(tmp_path / f"loop{seed}", method="loop", seed=seed, main="mae", better="min") as run:
            run.round(1, mae=50.0)
    made = paper(RECORDED.partition('baseline = "old"')[0])
    (row,) = made.rows()
    assert row.verdict.kind == "not played"
    assert 'is no share: write figure = "mae"' in made.failures["loop"]
    made = paper(RECORDED.partition('baseline = "old"')[0].replace('"50 %"', '50\nfigure = "mae"'))
    assert str(made.rows()[0].verdict) == "reproduced"
