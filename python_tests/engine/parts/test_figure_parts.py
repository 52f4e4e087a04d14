"""Parts that tell of the network and write the results, each on its own: no run is played."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedkern.data import Split
from fedkern.data.forms import ImageForm
from fedkern.engine.hooks import MethodCode
from fedkern.engine.images import Images
from fedkern.engine.parts.answers import Answers
from fedkern.engine.parts.base import Summary
from fedkern.engine.parts.diagnoses import Diagnoses
from fedkern.engine.parts.evaluation import Evaluation
from fedkern.engine.parts.oracle import Oracle
from fedkern.engine.parts.results import Results
from fedkern.engine.progress import Progress
from fedkern.engine.store import confusions
from fedkern.engine.store.saved_model import MODEL
from fedkern.engine.timing import Timing
from fedkern.errors import UserError
from fedkern.methods.base import Method
from fedkern.methods.common.final_figures import final_figures
from fedkern.privacy.disclosure import About, Disclosure
from fedkern.tasks import CLASSIFICATION
from python_tests.stand_ins import PRIVATE, Context, about, record, stored, values

FORM = ImageForm((1, 2, 2), (0.0,), (1.0,))

CPU = torch.device("cpu")
SETTINGS = {
    "method": "judged", "data": "tiny", "seed": 5, "clients": 2, "records": "all", "width": 2, "buffers": "average",
    "threads": 1, "client_threads": 1, "grad_cam": 0, "statistics": True, "main": "accuracy",
    "better": "max",
}  # fmt: skip


class Says(nn.Module):
    """A network that takes an image for a dog where its pixels are brighter than ``level``."""

    def __init__(self, level):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))

    def forward(self, images):
        dog = images.mean((1, 2, 3)) - self.level
        return torch.stack([-dog, dog], 1)


class Judged(Method):
    """A method that counts its evaluations."""

    def __init__(self):
        super().__init__()
        self.evaluated, self.observed = 0, None

    def evaluate(self, model, data):
        self.evaluated += 1
        return super().evaluate(model, data)

    def oracle_metrics(self, server, clients, sets):
        return {"paid": server + 1.0, "id_paid": 2.0, "unpaid": float(len(clients) + len(sets))}

    def diagnose(self, observed):
        self.observed = observed
        return {"odd": "It is odd.", "known": "It is known."}


def brightness_set(levels, labels, **more):
    """A set of an image of four pixels for every brightness, from 0 to 1."""
    images = (torch.tensor(levels) * 255).to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).clone()
    return Images(Split(images, torch.tensor(labels), **more), FORM, CPU, cache=True)


def code(method):
    return MethodCode(type(method), "judged", Progress())


class Bench:
    """The part of the evaluation: two test sets, and two clients with sets of their own."""

    def __init__(self, *, clients=True, own=True):
        self.method, self.network, self.context = Judged(), Says(0.5), Context(2, **SETTINGS)
        self.context.data.tests, self.context.site_sets = {}, {}
        # At a level of 0.5 all of "id" is right, and three quarters of "ood".
        self.sets = {
            "id_": brightness_set([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]),
            "ood_": brightness_set([0.1, 0.2, 0.8, 0.9], [0, 1, 1, 1]),
        }
        own_sets = {0: brightness_set([0.1, 0.9], [0, 1]), 1: brightness_set([0.1, 0.9], [1, 1])} if own else {}
        self.part = Evaluation(
            self.method, SimpleNamespace(network=lambda: self.network), code(self.method), self.context, self.sets,
            own_sets, clients=clients, client=None,
        )  # fmt: skip

    def round(self, number=1, **given):
        one = record(number, **{"due": True, **given})
        self.part.round_end(one)
        return one

    def finish(self):
        summary = Summary(self.network)
        self.part.finish(summary)
        return summary


# -- the evaluation ----------------------------------------------------------------------------------------------------


def test_a_record_has_the_figures_of_the_network():
    one = Bench().round(clients={"0": {"loss": 1.0}, "1": {"loss": 2.0}, "2": {}})
    told = values(one)
    assert (told["id_accuracy"], told["ood_accuracy"], told["loss"]) == (1.0, 0.75, 1.5)
    assert (told["mean_client_accuracy"], told["worst_client_accuracy"]) == (0.75, 0.5)
    assert about(one, About.CLIENTS) == {"loss", "client_metrics"}
    assert told["client_metrics"]["1"]["accuracy"] == 0.5
    assert not any("auroc" in name for name in told)  # which the summary has
    assert about(one, About.SERVER) == set()
    assert one.seconds["evaluate"] > 0


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
        assert bench.context.warnings["no-grad-cam"].startswith(said)
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
        assert summary.entries["worst_client"] == {"client": 1, "metric": "accuracy", "value": 0.5}
    else:
        assert summary.entries.keys() == {"per_class"}
        assert summary.of_clients == {}


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


@pytest.mark.parametrize("first", [False, True])
def test_a_figure_that_is_not_finite_is_never_the_best(first):
    bench, again = Bench(), Bench()
    for undefined in (first, not first):
        bench.method.evaluate = (lambda model, data: {"accuracy": math.nan}) if undefined else Judged().evaluate
        bench.round()
    assert bench.part.best["id_accuracy"] == 1.0
    bench.part.best.clear()
    bench.method.evaluate = lambda model, data: {"accuracy": math.inf}
    bench.round()
    again.part.restore(stored(bench.part.state() | {"latest": {}}))
    again.round()
    assert again.part.best["id_accuracy"] == 1.0


def test_the_evaluation_goes_on_from_a_checkpoint():
    bench, again = Bench(), Bench()
    bench.round(1)
    bench.network = again.network = Says(0.15)
    bench.round(3)
    bench.part.latest["id_spread"] = math.nan
    again.part.restore(stored(bench.part.state()))
    assert again.part.best == bench.part.best
    assert again.part.latest == {**bench.part.latest, "id_spread": None}
    del bench.part.latest["id_spread"]
    one, other = bench.finish(), again.finish()
    assert other.metrics == one.metrics
    assert other.entries == one.entries
    assert other.best == one.best


# -- answers -----------------------------------------------------------------------------------------------------------


def answered(out, *, keep=True, alone=lambda: None, counts=True, each=True):
    """Writes the answers to a test set of two images."""
    sets, network = {"id_": brightness_set([0.1, 0.9], [1, 1])}, Says(0.5)
    if keep:
        with sets["id_"].keeping():
            Judged().evaluate(network, sets["id_"])
    context = Context(**SETTINGS)
    summary = Summary(network, final=final_figures(sets, ("cat", "dog")))
    Answers(out, context, sets, alone, counts=counts, each=each).finish(summary)
    return context.warnings


def test_answers_are_written_as_counts_and_image_by_image(tmp_path):
    assert answered(tmp_path) == {}
    assert confusions.read(tmp_path).matrices["id"].tolist() == [[0, 0], [1, 1]]
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["test_set"], row["true_class"], row["predicted_class"]) for row in rows] == [
        ("id", "dog", "cat"), ("id", "dog", "dog"),
    ]  # fmt: skip


def test_answers_that_are_not_asked_for_may_not_be_told_or_are_not_there(tmp_path):
    assert answered(tmp_path, counts=False, each=False) == {}
    assert [*answered(tmp_path, keep=False)] == ["no-predictions"]
    assert [*tmp_path.iterdir()] == []


def test_answers_are_not_written_to_a_folder_that_was_taken_over(tmp_path):
    def taken():
        raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"):
        answered(tmp_path, alone=taken)
    assert [*tmp_path.iterdir()] == []


# -- diagnoses ---------------------------------------------------------------------------------------------------------


def diagnoses(*, clients=True):
    method, context = Judged(), Context(**SETTINGS)
    context.warn("known", "It was known before.")
    return method, context, Diagnoses(method, code(method), context, {}, clients=clients)


def reported(part):
    """Has a set-up round and two communication rounds report, the last one with a client far from the others."""
    part.round_end(record(-1, reports=[{"loss": 8.0, "samples": 3}], clients={"0": {"drift": 100.0}}))
    part.round_end(record(1, reports=[{"loss": 1.0}, {"loss": math.nan}]))
    drifts = {str(k): {"drift": drift} for k, drift in enumerate((1.0, 1.0, 90.0))}
    part.round_end(record(2, reports=[{"loss": 3.0}], clients=drifts))


@pytest.mark.parametrize("resumed", [False, True])
def test_diagnoses_of_what_clients_reported(resumed):
    method, context, part = diagnoses()
    reported(part)
    if resumed:
        state = stored(part.state())
        method, context, part = diagnoses()
        part.restore(state)
    part.round_end(record(-4, clients={str(k): {"drift": 1.0} for k in range(3)}))  # says nothing of the last round
    part.finish(Summary(nn.Identity(), metrics={"accuracy": 0.5}))
    loss = method.observed["loss"]
    assert (loss.count, loss.mean, loss.low, loss.high) == (3, 4.0, 1.0, 8.0)
    assert [*context.warnings] == ["known", "outlying-client", "chance-level", "odd"]
    assert "client 2 is 90 times" in context.warnings["outlying-client"]
    assert context.warnings["known"] == "It was known before."
    # A run that is made longer drops what was said of the network that is not the final one any more.
    assert part.state()["final"] == ["outlying-client", "chance-level", "odd"]


def test_diagnoses_of_private_clients_are_left_out():
    method, context, part = diagnoses(clients=False)
    reported(part)
    part.finish(Summary(nn.Identity(), metrics={"accuracy": 0.5}))
    assert method.observed is None
    assert [*context.warnings] == ["known", "chance-level"]


# -- figures of an experimenter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disclosure", "told"),
    [
        (Disclosure(), {"paid": 2.0, "id_paid": 2.0, "unpaid": 4.0}),
        (Disclosure(clients=False, appraised=("paid",)), {"paid": 2.0, "id_paid": 2.0}),
        (PRIVATE, {}),
    ],
)
def test_figures_that_only_an_experimenter_can_have(disclosure, told, monkeypatch):
    method, summary = Judged(), Summary(nn.Identity(), metrics={"accuracy": 0.5})
    if not told:
        monkeypatch.setattr(method, "oracle_metrics", None)  # nobody computes what nobody may know
    Oracle(method, 1.0, code(method), {0: None, 1: None, 2: None}, {"id_": None}, disclosure).finish(summary)
    assert summary.metrics == {"accuracy": 0.5, **told}


def test_an_experimenters_figures_are_numbers(monkeypatch):
    method, summary = Judged(), Summary(nn.Identity())
    part = Oracle(method, None, code(method), {}, {}, Disclosure())
    monkeypatch.setattr(method, "oracle_metrics", lambda *_: {"half": np.float32(0.5), "two": torch.tensor(2)})
    part.finish(summary)
    assert json.dumps(summary.metrics) == '{"half": 0.5, "two": 2.0}'
    monkeypatch.setattr(method, "oracle_metrics", lambda *_: {"both": [0.5, 1.0]})
    with pytest.raises(UserError, match=r'oracle_metrics\["both"\] must be a number, not list: report a number'):
        part.finish(summary)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, ("x", "y")])
def test_the_files_of_a_run(names, tmp_path):
    context = Context(2, **SETTINGS)
    context.model_name, context.described = "cnn", {}
    facts = {"task": CLASSIFICATION, "form": FORM}
    vars(context.data).update(
        client_names=names, statistics=SimpleNamespace(held_out=("z", 3) if names else None), **facts
    )
    summary = Summary(
        Says(0.25), metrics={"accuracy": 0.5, "epsilon": 2.0}, of_tests={"accuracy": 0.5},
        of_clients={1: {"accuracy": None}}, client_set="own", entries={"bytes": {"total": 8}, "diagnostics": {}},
    )  # fmt: skip
    Results(tmp_path, context, {"": None}, Progress(done=2), Timing()).finish(summary)
    assert (tmp_path / "evaluation.csv").read_text().splitlines() == [
        "client,test_set,metric,value", ",test,accuracy,0.5", f"{'y' if names else 1},own,accuracy,",
    ]  # fmt: skip
    assert load_file(tmp_path / MODEL)["level"] == 0.25
    written = json.loads((tmp_path / "summary.json").read_text())
    named = {"client_names": ["x", "y"], "held_out_client_name": "z"} if names else {}
    first = {"method": "judged", "data": "tiny", "model": "cnn", "seed": 5, "rounds": 2, "clients": 2, **named}
    assert [*written] == [*first, "metrics", "bytes", "diagnostics", "seconds", "records", "versions"]
    assert written == {**summary.entries, **first}
    assert written["metrics"] == {"accuracy": 0.5, "epsilon": 2.0}
