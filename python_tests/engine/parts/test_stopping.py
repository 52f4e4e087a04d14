"""``--stop-at``, ``--patience`` and budgets: the end of a run, its results, and the same end after an interruption."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import fedkern
from fedkern.downstream.run_evaluation import evaluate_run
from fedkern.downstream.saved_network import read_model
from fedkern.engine.parts.budgets import MaxBytes, MaxSeconds
from fedkern.engine.parts.part import Record
from fedkern.engine.parts.stopping import Patience, StopAt
from fedkern.engine.rounds.ledger import Ledger
from fedkern.engine.rounds.round_log import Timing
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods.base import Phase, Round
from fedkern.privacy.guarantee import About, Disclosure
from fedkern.report.pages.run_page import headline
from fedkern.report.run_contents import read_run_folder
from fedkern.settings.config import RunConfig, load_settings
from python_tests.hearing import Hearing
from python_tests.interrupted import KillAt, kill_and_resume, outcome, play_killed
from python_tests.saved_network import tensors
from python_tests.stand_ins import Context, run_objects


def record(number, due=True, about=About.RUN, **figures):
    made = Record(Round(), number, 9, [0], due)
    made.put(figures, about)
    return made


def stop_at(target, tests=(), **told):
    context = Context(disclosure=Disclosure(**told), stop_at=target)
    context.data.tests = tests
    return StopAt(run_objects(context))


@pytest.mark.parametrize(
    ("target", "before", "reached"),
    [("accuracy>=0.5", 0.4999, 0.5), ("accuracy >= 5e-1", 0.2, 0.9), ("loss<=0.1", 0.11, 0.1), ("loss<=-1", 0.0, -1.5)],
)
def test_a_run_ends_with_the_round_that_reaches_the_value(target, before, reached):
    part, figure = stop_at(target), target.split("=")[0].strip(" <>")
    assert part.round_end(record(1, **{figure: before})) is None
    assert part.round_end(record(2, due=False, **{figure: reached})) is None  # the figure of an earlier round
    assert part.before_round(record(3)) is None
    stop = part.round_end(record(3, **{figure: reached}))
    assert stop.name == "stop-at"
    assert stop.reason.startswith(f"{figure} is {reached:.4g} in round 3 (--stop-at {figure}")
    again = stop_at(target)
    again.restore(part.state())
    assert again.before_round(record(4)) == stop  # killed before its end, it does not go on


@pytest.mark.parametrize(
    "target", ["accuracy", "accuracy>0.5", ">=0.5", "accuracy>=", "accuracy>=e", "a>=nan", "a>=1>=2"]
)
def test_another_target_is_refused(target):
    with pytest.raises(UserError, match="--stop-at must be FIGURE>=VALUE or FIGURE<=VALUE, such as "):
        RunConfig.make("fedavg", stop_at=target)


@pytest.mark.parametrize(
    ("target", "fraction"),
    [("accuracy>=90", 0.9), ("ood_macro_f1>=55.5", 0.555), ("validation_north_dice>=1.5", 0.015), ("dice_12>=300", 0.9),
     ("worst_client_accuracy>=80", 0.8), ("mean_i2t_r1>=2", 0.02), ("ece<=-1", 0.9)],
)  # fmt: skip
def test_a_value_that_no_fraction_reaches_is_refused(target, fraction):
    with pytest.raises(UserError, match=f"^--stop-at: .*is a fraction from 0 to 1, .* such as {fraction}\\.$"):
        stop_at(target, tests=["validation_north", "mean", ""])


@pytest.mark.parametrize(
    "target", ["top2>=90", "north_score>=90", "vote_accuracy>=90", "loss>=90", "id_hd95<=-1", "accuracy>=1", "ece<=0"]
)
def test_other_values_may_be_per_cent(target):
    stop_at(target, tests=["north"])


def test_a_figure_that_may_not_be_told_ends_no_run():
    part = stop_at("weight>=0.5", clients=False, server=False)
    with pytest.raises(UserError, match='have no figure "weight", but accuracy\\.'):
        part.round_end(dataclasses.replace(record(1, about=About.SERVER, weight=0.9), entries={
            "weight": (About.SERVER, 0.9), "accuracy": (About.RUN, 0.1)}))  # fmt: skip


@pytest.fixture
def data(make_data):
    return make_data()


def patient(make_config, **settings):
    return make_config("fedavg", **{"rounds": 12, "patience": 2, "lr": 0.2, **settings})


def test_the_best_round_stays_beside_the_last(data, make_config, tmp_path):
    config = patient(make_config)
    summary = run(config, out=tmp_path / "patient", data=data)
    values = [entry["validation_accuracy"] for entry in read_metrics(tmp_path / "patient")]
    best = values.index(max(values)) + 1
    assert len(values) == best + 2 < 12
    figures = summary["best"].pop("metrics")
    assert summary["best"] == {
        "round": best, "figure": "validation_accuracy", "value": max(values), "file": "best.safetensors",
    }  # fmt: skip
    assert {"id_accuracy", "ood_loss", "validation_accuracy"} < figures.keys()
    assert figures.items() < read_metrics(tmp_path / "patient")[best - 1].items()
    assert summary["stopped"]["by"] == "patience"
    run(config.replace(patience=None, rounds=best), out=tmp_path / "short", data=data)
    expected = tensors(tmp_path / "short")
    found = load_file(tmp_path / "patient" / "best.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not list((tmp_path / "patient").glob("best-*"))
    assert f"It ended before its 12 rounds were over: {summary['stopped']['reason']}." in headline(
        read_run_folder(tmp_path / "patient")
    )


@pytest.mark.parametrize("buffers", ["average", pytest.param("drop", marks=pytest.mark.exhaustive)])
def test_the_best_network_is_read_as_the_last_one_is(buffers, data, make_config, tmp_path):
    out = tmp_path / "run"
    best = run(patient(make_config, buffers=buffers), out=out, data=data)["best"]
    module, about = read_model(out, best=True)
    assert about["rounds"] == best["round"]
    file = load_file(out / "best.safetensors")
    assert all(torch.equal(value, file[name]) for name, value in module.state_dict().items())
    found = evaluate_run(out, data=data, best=True)[0]
    assert {name: found[name] for name in best["metrics"]} == best["metrics"]
    assert found != evaluate_run(out, data=data)[0]
    opened = fedkern.load(out, data=data)
    assert not all(map(torch.equal, opened.model(best=True).parameters(), opened.model().parameters()))
    of_best = out / "best.safetensors"
    shutil.copy(out / "model.safetensors", of_best)
    with pytest.raises(UserError, match=f"^{of_best} is not what the run wrote: put the file back\\.$"):
        read_model(out, best=True)
    of_best.write_bytes(of_best.read_bytes()[:50])
    with pytest.raises(UserError, match=f"^{of_best} is damaged .*: put the file back\\.$"):
        read_model(out, best=True)
    of_best.unlink()
    with pytest.raises(UserError, match=r"has no best\.safetensors: a run with --patience keeps it; take --network"):
        read_model(out, best=True)
    read_model(out)
    (out / "model.safetensors").unlink()  # as of an extended run
    with pytest.raises(UserError, match=r"has no model\.safetensors: its run is not finished"):
        read_model(out, best=True)


@pytest.mark.parametrize(
    ("method", "options"), [("local", {}), ("fedproto", {"networks": "averaged", "predict": "prototype"})]
)
def test_of_a_method_with_a_module_of_its_own_the_best_figures_are_told(method, options, data, make_config, tmp_path):
    config = make_config(method, rounds=2, patience=2, options=options)
    summary = run(config, out=tmp_path, data=data)
    assert "id_accuracy" in summary["best"]["metrics"]
    with pytest.raises(UserError, match=f"holds a module of {method}, .* which no checkpoint keeps: take"):
        read_model(tmp_path, best=True)


def test_a_round_whose_figure_is_nan_is_never_the_best(data, make_config, tmp_path, monkeypatch):
    values = iter([math.nan, 0.5, math.nan, math.nan])
    monkeypatch.setattr(Patience, "_main", lambda self, told: ("validation_accuracy", next(values)))
    summary = run(patient(make_config), out=tmp_path, data=data)
    assert (summary["rounds"], summary["best"]["round"], summary["best"]["value"]) == (4, 2, 0.5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("flag", ["patience", "stop_at"])
@pytest.mark.parametrize("at", [("round-start", 1), ("client", 4), ("end", 0)])
def test_an_interrupted_run_ends_alike(flag, at, data, make_config, tmp_path):
    config = patient(make_config)
    if flag == "stop_at":
        run(config.replace(patience=None, rounds=4), out=tmp_path / "four", data=data)
        losses = [entry["loss"] for entry in read_metrics(tmp_path / "four")]
        assert min(losses) < losses[0]
        config = config.replace(patience=None, stop_at=f"loss<={min(losses)!r}")
    summary = run(config, out=tmp_path / "whole", data=data)
    assert 1 < summary["rounds"] < 12
    assert kill_and_resume(config, out=tmp_path / "cut", data=data, at=KillAt(*at)) == outcome(tmp_path / "whole")
    best = [tmp_path / name / "best.safetensors" for name in ("cut", "whole")]
    assert [path.exists() for path in best] == 2 * [flag == "patience"]
    if best[0].exists():
        assert best[0].read_bytes() == best[1].read_bytes()


@pytest.mark.parametrize("name", ["validation_north", "validation_validation", "north", "", "v"])
def test_patience_looks_at_the_validation_set_alone(name, tmp_path):
    told = {f"{name}_accuracy" if name else "accuracy": 0.9, "validation_loss": 0.8, "worst_client_accuracy": 0.7}
    context = Context(main="accuracy", better="max", patience=1)
    context.data.tests = [name, "a"]
    part = Patience(run_objects(context, out=tmp_path))
    assert part._main({**told, "validation_accuracy": 0.5}) == ("validation_accuracy", 0.5)
    with pytest.raises(UserError, match="--patience looks at the main figure on a validation set"):
        part._main(told)


def test_a_lost_network_of_the_best_round_is_named(data, make_config, tmp_path):
    play_killed(patient(make_config, patience=9), out=tmp_path, data=data, at=KillAt("round-start", 5))
    for path in tmp_path.glob("best-*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="is not what the run wrote of its best round: put the file back"):
        run(load_settings(tmp_path), out=tmp_path, resume=True, data=data)


def test_nothing_is_left_of_a_run_that_cannot_look(data, make_config, refuses, tmp_path):
    unvalidated = dataclasses.replace(data, validation=data.validation.subset(torch.zeros(0, dtype=torch.int64)))
    heard = Hearing()
    with pytest.raises(UserError, match="--patience looks at the main figure on a validation set, and this run has"):
        run(patient(make_config), out=tmp_path / "run", data=unvalidated, listener=heard)
    assert heard.drawn == []  # no round is begun
    with refuses('have no figure "acuracy", but id_accuracy, '):
        run(make_config(stop_at="acuracy>=0.5"), out=tmp_path / "run", data=data)


@pytest.mark.parametrize("given", [{"stop_at": "accuracy>=0.5"}, {"patience": 3}])
def test_rounds_that_belong_together_are_not_cut(given, make_config):
    with pytest.raises(UserError, match="is not for fusefl, a one-shot method, whose rounds belong together"):
        make_config("fusefl", rounds=None, **given)


# -- budgets -----------------------------------------------------------------------------------------------------------


def open_record(entry=None):
    return Record(entry or Round(), 1, 9, [0])


def at_most_100(ledger):
    return MaxBytes(run_objects(SimpleNamespace(config=SimpleNamespace(max_bytes=100)), ledger=ledger))


def play_round(part, ledger, size, *, one_off=False):
    """Play a round in which a client is sent ``size`` bytes.

    Returns the reason to stop before the round, or None after playing it.
    """
    entry = Round(one_off=one_off)
    if (stop := part.before_round(open_record(entry))) is not None:
        return stop
    ledger.begin_round()
    ledger.book(0, "down", "x" * size, phase=None if one_off else Phase(0, "train", "update"))
    return part.round_end(open_record(entry))


def test_the_round_that_would_pass_the_bytes_is_not_begun():
    ledger = Ledger(1)
    part = at_most_100(ledger)
    assert [play_round(part, ledger, size) for size in (30, 40)] == [None] * 2
    stop = play_round(part, ledger, 1)  # 70 are spent, and a round took up to 40
    assert (stop.name, stop.reason) == (
        "max-bytes", "70 bytes are spent, and a round takes up to 40 (--max-bytes 100)",
    )  # fmt: skip
    assert ledger.total == 70


def test_a_round_that_fits_to_the_byte_is_begun():
    ledger = Ledger(1)
    part = at_most_100(ledger)
    assert [play_round(part, ledger, 50) for _ in range(2)] == [None] * 2
    assert play_round(part, ledger, 50) is not None


def test_set_up_rounds_are_spent_and_never_left_out():
    ledger = Ledger(1)
    part = at_most_100(ledger)
    assert play_round(part, ledger, 70, one_off=True) is None
    assert play_round(part, ledger, 30) is None
    assert play_round(part, ledger, 5, one_off=True) is None
    assert play_round(part, ledger, 1).name == "max-bytes"


def test_what_a_round_took_survives_a_checkpoint():
    ledger = Ledger(1)
    part, again = at_most_100(ledger), at_most_100(ledger)
    play_round(part, ledger, 60)
    assert again.before_round(open_record()) is None
    again.restore(json.loads(json.dumps(part.state())))
    assert again.before_round(open_record()) == part.before_round(open_record()) is not None


def test_seconds_are_those_of_work_over_all_resumptions():
    timing = Timing()
    part = MaxSeconds(run_objects(SimpleNamespace(config=SimpleNamespace(max_seconds=100.0)), timing=timing))
    timing.restore(60.0, {})
    assert part.before_round(open_record()) is None
    long = open_record()
    long.started -= 45.0
    part.round_end(long)
    stop = part.before_round(open_record())
    assert stop.name == "max-seconds"
    assert stop.reason == "60 seconds are spent, and a round takes up to 45 (--max-seconds 100)"


def test_a_run_keeps_to_its_bytes_and_goes_on_alike(make_data, make_config, tmp_path):
    data, config = make_data(), make_config("fedavg", rounds=9)
    unlimited = run(config.replace(rounds=3), out=tmp_path / "three", data=data)
    limited = config.replace(max_bytes=unlimited["bytes"]["total"] + 10.0)
    summary = run(limited, out=tmp_path / "limited", data=data)
    assert (summary["rounds"], summary["bytes"]["total"]) == (3, unlimited["bytes"]["total"])
    assert summary["stopped"]["by"] == "max-bytes"
    again = kill_and_resume(limited, out=tmp_path / "cut", data=data, at=KillAt("client", 5))
    assert again == outcome(tmp_path / "limited")


@pytest.mark.parametrize("given", [{"max_seconds": 0.0}, {"max_bytes": -1.0}, {"max_bytes": "much"}])
def test_budgets_are_positive_numbers(given, make_config):
    with pytest.raises(UserError, match=r"--max-(seconds|bytes) must be"):
        make_config("fedavg", **given)
