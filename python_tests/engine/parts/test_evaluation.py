"""The part that evaluates the network."""

import math
from types import SimpleNamespace

import pytest

from fedkern.engine.parts.evaluation import Evaluation
from fedkern.engine.parts.part import Summary
from fedkern.privacy.guarantee import About, Disclosure
from python_tests.engine.parts.judged import SETTINGS, Judged, Says, brightness_set, code
from python_tests.stand_ins import Context, about, record, round_trip, run_objects, values


class Bench:
    """The part of the evaluation: two test sets, and two clients with sets of their own."""

    def __init__(self, *, clients=True, own=True):
        self.method, self.network = Judged(), Says(0.5)
        self.context = Context(2, Disclosure(clients=clients), own_networks=False, **SETTINGS)
        self.context.data.tests, self.context.samples.site_sets = {}, {}
        # At a level of 0.5 all of "id" is right, and three quarters of "ood".
        self.sets = {
            "id_": brightness_set([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]),
            "ood_": brightness_set([0.1, 0.2, 0.8, 0.9], [0, 1, 1, 1]),
        }
        self.context.samples.client_sets = (
            {0: brightness_set([0.1, 0.9], [0, 1]), 1: brightness_set([0.1, 0.9], [1, 1])} if own else {}
        )
        hooks = {"method": SimpleNamespace(network=lambda: self.network)}
        run = run_objects(self.context, method=self.method, hooks=hooks, code=code(self.method), sets=self.sets)
        self.part = Evaluation(run)

    def round(self, number=1, **given):
        noted = record(number, **{"due": True, **given})
        self.part.round_end(noted)
        return noted

    def finish(self):
        summary = Summary(self.network)
        self.part.finish(summary)
        return summary


def test_a_record_has_the_figures_of_the_network():
    noted = Bench().round(clients={"0": {"loss": 1.0}, "1": {"loss": 2.0}, "2": {}})
    told = values(noted)
    assert (told["id_accuracy"], told["ood_accuracy"], told["loss"]) == (1.0, 0.75, 1.5)
    assert (told["mean_client_accuracy"], told["worst_client_accuracy"]) == (0.75, 0.5)
    assert about(noted, About.CLIENTS) == {"loss", "client_metrics"}
    assert told["client_metrics"]["1"]["accuracy"] == 0.5
    assert not any("auroc" in name for name in told)  # which the summary has
    assert about(noted, About.SERVER) == set()
    assert noted.seconds["evaluate"] > 0


def test_a_grad_cam_that_fails_is_a_warning_and_leaves_the_figures(monkeypatch):
    def failing(error):
        def call(*_):
            raise error

        monkeypatch.setattr("fedkern.engine.parts.evaluation.gradcam", call)

    for error in (StopIteration(), RuntimeError("odd map"), AttributeError("maps")):
        bench = Bench()
        failing(error)
        assert bench.finish().metrics["id_accuracy"] == 1.0
        said = f"The figures of Grad-CAM are missing: {type(error).__name__}"
        assert bench.context.notices.warnings["no-grad-cam"].startswith(said)
    failing(MemoryError())
    with pytest.raises(MemoryError):
        bench.finish()


def test_nothing_is_told_of_clients_where_nothing_may_be():
    told = values(Bench(clients=False).round())
    assert "id_accuracy" in told
    assert not any("client" in name for name in told)


def test_rounds_without_an_evaluation():
    bench = Bench()
    reported = {"0": {"loss": 1.0}}
    assert values(bench.round(-1, clients=reported)) == {}
    assert values(bench.round(due=False, clients=reported)) == {"loss": 1.0}
    bench.network = None
    assert values(bench.round()) == {}  # none yet
    assert bench.method.evaluated == 0


def test_the_best_figures_stay_and_the_last_ones_go():
    bench = Bench()
    bench.round(1)
    bench.network = Says(0.15)  # everything but the darkest is a dog
    bench.round(2)
    assert (bench.part.latest["id_accuracy"], bench.part.latest["ood_accuracy"]) == (0.75, 1.0)
    assert (bench.part.best["id_accuracy"], bench.part.best["ood_accuracy"]) == (1.0, 1.0)
    assert "id_loss" not in bench.part.best  # the smallest would be


@pytest.mark.parametrize("own", [False, True])
def test_what_the_summary_gets(own):
    bench = Bench(own=own)
    bench.round(3)
    summary = bench.finish()
    assert summary.latest is bench.part.latest
    assert summary.best is bench.part.best
    assert summary.of_tests == summary.metrics
    assert summary.metrics["ood_balanced_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary.entries["per_class"]["ood"]["recall"] == {"cat": 1.0, "dog": pytest.approx(2 / 3)}
    assert summary.final.confusion["ood"].tolist() == [[1, 0], [1, 2]]
    if own:
        assert summary.client_set == summary.entries["client_test_set"] == "own"
        assert summary.of_clients[1]["accuracy"] == summary.entries["client_metrics"]["1"]["accuracy"] == 0.5
        assert [(row["set"], row["value"], row["units"]) for row in summary.entries["intervals"]] == [
            ("id", 1.0, 4), ("ood", 0.75, 4), ("own", 1.0, 2), ("own", 0.5, 2)
        ]  # fmt: skip
        assert summary.entries["worst_client"] == {"client": 1, "metric": "accuracy", "value": 0.5}
    else:
        assert summary.entries.keys() == {"per_class", "better", "intervals", "test_labels"}
        assert summary.entries["test_labels"].keys() == {"id", "ood"}
        assert summary.of_clients == {}
        assert summary.entries["better"]["ood_loss"] == "min"


def test_the_network_is_evaluated_at_the_end_only_where_it_has_to_be():
    bench = Bench(own=False)
    bench.round(3)
    assert bench.method.evaluated == 2
    bench.finish()
    assert bench.method.evaluated == 2  # the last round's answers are there
    bench.round(-4)  # a closing round may change the network
    bench.finish()
    assert bench.method.evaluated == 4
    early = Bench(own=False)
    early.round(2)
    early.finish()
    assert early.method.evaluated == 4  # the answers of round 2 of 3 were not kept


@pytest.mark.parametrize("undefined_first", [False, True])
def test_a_figure_that_is_not_finite_is_never_the_best(undefined_first):
    bench, again = Bench(), Bench()
    for undefined in (undefined_first, not undefined_first):
        bench.method.evaluate = (lambda model, data: {"accuracy": math.nan}) if undefined else Judged().evaluate
        bench.round()
    assert bench.part.best["id_accuracy"] == 1.0
    bench.part.best.clear()
    bench.method.evaluate = lambda model, data: {"accuracy": math.inf}
    bench.round()
    again.part.restore(round_trip(bench.part.state() | {"latest": {}}))
    again.round()
    assert again.part.best["id_accuracy"] == 1.0


def test_the_evaluation_goes_on_from_a_checkpoint():
    bench, again = Bench(), Bench()
    bench.round(1)
    bench.network = again.network = Says(0.15)
    bench.round(3)
    bench.part.latest["id_spread"] = math.nan
    again.part.restore(round_trip(bench.part.state()))
    assert again.part.best == bench.part.best
    assert again.part.latest == {**bench.part.latest, "id_spread": None}
    del bench.part.latest["id_spread"]
    summary, resumed = bench.finish(), again.finish()
    assert resumed.metrics == summary.metrics
    assert resumed.entries == summary.entries
    assert resumed.best == summary.best
