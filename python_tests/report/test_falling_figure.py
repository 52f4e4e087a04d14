"""Runs whose main figure falls or needs no learning, such as the mean absolute error of grades."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedkern.comparison import cell_runner, comparison_page
from fedkern.comparison.cells import Variant
from fedkern.comparison.found_runs import Group, OwnRun
from fedkern.comparison.run_results import Result
from fedkern.comparison.seed_statistics import Target
from fedkern.data import load
from fedkern.engine.figures import diagnostics
from fedkern.engine.parts.evaluation import Evaluation
from fedkern.engine.parts.part import Stop
from fedkern.engine.parts.stopping import Patience
from fedkern.engine.store.confusions import Confusions
from fedkern.engine.store.record_files import DataFacts
from fedkern.report import run_contents, tables
from fedkern.report.figures.curves import accuracy_panels, client_panels, draw_panels
from fedkern.report.pages import run_page
from fedkern.report.pages.html_page import Chart
from fedkern.report.run_contents import Contents
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import load_data
from fedkern.tasks import Constant
from python_tests.stand_ins import Context, run_objects

FALLING = RunConfig.make("fedavg", data="digits", clients=45, main="mae", better="min")
VALUES = (1.5, 0.75, 1.25)
RECORDS = [
    {"round": i, "mae": value, "validation_mae": value, "accuracy": 0.5, "loss": value, "mean_client_mae": value,
     "worst_client_mae": 2 * value, "bytes_up": 1, "bytes_down": 1, "seconds": 1.0, "clients": {}}
    for i, value in enumerate(VALUES, 1)
]  # fmt: skip


def summary(mae, **figures):
    return {"metrics": {"accuracy": 0.5, "mae": mae, "validation_mae": mae}, "bytes": {"total": 10, "up": 5, "down": 5},
            "seconds": 1.0, "rounds": 3, "method": "fedavg", "data": "digits", "seed": 0, **figures}  # fmt: skip


def test_a_run_s_page_has_the_figure_in_its_own_unit(tmp_path):
    (tmp_path / "config.toml").write_text(FALLING.to_toml())
    own = {str(k): {"mae": 0.01 * k, "loss": 1.0} for k in range(45)}
    worst = {"client": 44, "metric": "mae", "value": 0.44}
    told = summary(1.25, client_metrics=own, worst_client=worst)
    page = run_page.page(Contents(tmp_path, FALLING, RECORDS, told, DataFacts()))
    assert page.headline[0] == "fedavg reaches mae 1.25 on the test set after 3 rounds."
    assert "The worst of 45 clients is client 44, with mae 0.44." in page.headline
    assert page.tiles[0] == ("mae", "1.25")
    charts = {b.name: b for section in page.sections for b in section.blocks if isinstance(b, Chart)}
    parts = {"test: 1.5 in round 1, 1.25 in round 3", "validation: 1.5 in round 1, 1.25 in round 3"}
    assert {*charts["main"].text.rstrip(".").split("; ")} == parts
    assert charts["client-rounds"].text.startswith("mean client: 1.5 in round 1")
    assert charts["client-final"].note == "The 40 highest of 45."
    assert charts["client-final"].tables[0].rows[0] == ["client 44", "0.44"]
    assert page.sections[0].blocks[0].rows[0] == ["mae", "1.25"]


def test_curves_and_tables_begin_with_it_and_know_no_per_cent():
    axes = draw_panels(accuracy_panels(RECORDS, "mae", chance={"mae": 1.125})).axes[0]
    assert axes.get_ylabel() == "mae"
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[*VALUES], [*VALUES], [1.125, 1.125]]
    assert axes.get_ylim() == pytest.approx((0, 1.65))
    above = draw_panels(accuracy_panels(RECORDS, "mae", chance={"mae": 2.0})).axes[0]
    assert above.get_ylim() == pytest.approx((0, 2.2))  # the line of chance is inside
    worst = client_panels(RECORDS, "mae")[0].curves[-1]
    assert (worst.name, worst.rounds, worst.values) == ("worst client", [1, 2, 3], [3.0, 1.5, 2.5])
    assert tables.sort_metrics({"loss": 1.0, "accuracy": 0.5, "mae": 1.0}, main="mae") == ["mae", "accuracy", "loss"]
    assert tables.final_table(summary(1.25), "mae").rows[0][0] == "mae"
    shown = tables.own_tests_table({"client_metrics": {"0": {"mae": 1.25, "loss": 1.0}}}, "mae")
    assert shown.header == ["client", "mae", "loss"]


def make_run(mae, lr=0.1, **figures):
    return OwnRun.of(Path(f"x{mae}"), FALLING.replace(lr=lr), summary(mae, **figures), RECORDS)


def test_runs_are_compared_in_its_own_unit():
    groups = [
        Group("a", "fedavg", {0: make_run(1.5), 1: make_run(1.25)}),
        Group("b", "fedavg", {0: make_run(1.0), 1: make_run(1.0)}),
    ]
    result = Result(groups, Target.read("mae=1"))
    assert result.figures == ["mae"]
    assert [row[2] for row in result.text_table().rows] == ["1.38 ± 0.177", "1 ± 0"]
    assert result.text_table().rows[1][3].startswith("-0.375 [")
    assert "percentage points" not in " ".join(result.sentences())
    assert str(result.target) == "mae <= 1"
    assert result.target.cost_of_target(RECORDS)["rounds"] == 2
    assert "b is -0.375 from a (95 % interval" in comparison_page.headline(result)[1]
    chart, *_ = comparison_page._finals(result)
    assert chart.text.startswith("a: mean 1.38, runs 1.5, 1.25;")


def test_the_smallest_validation_figure_is_chosen(monkeypatch):
    variants = [Variant("fedavg", {"lr": lr}) for lr in (0.1, 0.2, 0.3)]
    runs = [SimpleNamespace(variant=variant) for variant in variants]

    class Runner:
        def plan(self, chosen, seeds):
            return runs

        def play(self, planned, score):
            for cell, mae in zip(planned, (1.5, 0.5, 1.0), strict=True):
                score(cell, make_run(mae))

    chosen, (told,) = cell_runner.pick_best(Runner(), {"fedavg": variants}, 0)
    assert chosen == [variants[1]]
    assert told == "fedavg: lr=0.2 was chosen by validation mae of seed 0 (lr=0.1: 1.5, lr=0.2: 0.5, lr=0.3: 1)."


def test_warnings_look_the_other_way():
    constant = {"": Constant({"mae": 1.0}, "mild")}

    def warn(mae, validation=0.5):
        figures = {"mae": mae, "validation_mae": validation}
        return diagnostics.poor_metrics(figures, {"validation_mae": 0.5}, 3, constant, FALLING)

    assert warn(0.5) == warn(0.89) == {}
    assert warn(0.95)["chance-level"].startswith('mae is 0.95, and predicting "mild" everywhere gives 1: ')
    assert warn(0.5, 0.62)["rising-mae"].startswith("Validation mae rose from 0.5 to 0.62: ")
    assert warn(0.5, 0.3) == {}
    constant["validation_"] = Constant({"mae": 1.5}, "")
    assert warn(0.5, 0.62) == {}
    assert warn(0.5, 0.7).keys() == {"rising-mae"}


def test_the_best_figure_and_the_end_of_patience(tmp_path, monkeypatch):
    monkeypatch.setattr("fedkern.engine.parts.stopping.write_model", lambda *_: None)
    monkeypatch.setattr("fedkern.engine.parts.stopping.about_network", lambda *_: {})
    monkeypatch.setattr("fedkern.engine.parts.stopping.checksum", lambda _: 0)
    context = Context(disclosure=SimpleNamespace(filter_entries=lambda entries: entries, clients=False))
    context.config, context.data.tests, context.samples.client_sets = FALLING.replace(patience=2), {"": None}, {}
    run = run_objects(context, out=tmp_path, hooks={"method": SimpleNamespace(network=lambda: object())})
    part = Patience(run)
    values = iter((1.5, 0.75, float("nan"), 1.0))
    stops = [
        part.round_end(SimpleNamespace(due=True, number=i, entries={"validation_mae": value}, figures={"mae": value}))
        for i, value in enumerate(values, 1)
    ]
    assert stops[:3] == [None] * 3
    assert isinstance(stops[3], Stop)
    assert part.state()["best"] == {"figure": "validation_mae", "value": 0.75, "round": 2, "file": part._best["file"],
                                    "metrics": {"mae": 0.75}, "sum": 0}  # fmt: skip
    judge = Evaluation(run)
    monkeypatch.setattr(judge, "_evaluate", lambda network, last, locally: judge.latest.update(mae=next(values)))
    values = iter((1.5, 0.75, float("nan"), 1.0))
    for _ in VALUES:
        entry = SimpleNamespace(one_off=False)
        judge.round_end(
            SimpleNamespace(
                entry=entry, clients={}, due=True, last=False, in_server_process=False, put=lambda *_: None, seconds={}
            )
        )
    assert judge.best == {"mae": 0.75}


# -- run contents ------------------------------------------------------------------------------------------------------


def test_figures_of_a_prediction_that_is_always_the_same():
    data = load("digits", clients=2, seed=0, train_samples=60)
    labels = data.tests[""].labels
    share = int(torch.bincount(labels).max()) / len(labels)
    records = [{"accuracy": 0.5, "validation_accuracy": 0.4, "loss": 1.0}, {"far_recall": 0.7, "round": 2}]
    assert run_contents.constant_figures(records, "accuracy", DataFacts.of(data, private=False).chance, None, 10) == {
        "accuracy": share
    }
    pairs = [{"i2t_r1": 0.1, "gallery": 40.0, "unseen_i2t_r1": 0.1, "unseen_gallery": 20.0, "minority_i2t_r1": 0.6}]
    assert run_contents.constant_figures(pairs, "i2t_r1", {}, None, 0) == {"i2t_r1": 1 / 40, "unseen_i2t_r1": 1 / 20}
    assert run_contents.constant_figures([{"ood_macro_auroc": 0.6}], "macro_auroc", {}, None, 0) == {
        "ood_macro_auroc": 0.5
    }
    assert run_contents.constant_figures([{"score": 0.6}], "score", {}, None, 0) == {}  # of a task that nobody knows


def test_counts_of_a_confusion_matrix_come_first():
    matrices = {"test": np.array([[3, 0], [1, 0]]), "ood": np.array([[0, 0], [0, 0]])}
    records, counted = [{"accuracy": 1.0, "ood_accuracy": 1.0}], Confusions(("a", "b"), matrices)
    found = run_contents.constant_figures(records, "accuracy", {}, counted, 2)
    assert found == {"accuracy": 0.75}


def test_the_dice_of_one_class_everywhere():
    options = {"test_samples": 12}
    data = load_data(RunConfig.make("fedavg", data="segdigits", clients=2, train_samples=20, data_options=options))
    found = run_contents.constant_figures(
        [{"dice": 0.5}], "dice", DataFacts.of(data, private=False).chance, None, len(data.classes)
    )
    assert found.keys() == {"dice"}
    assert 0 < found["dice"] < 0.5
