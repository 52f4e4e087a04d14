"""Tests of metrics that users register."""

import pytest
import torch

from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.methods import register_metric
from fedkern.settings.stored import load_settings
from python_tests.interrupted import Kill, KillAt, outcome
from python_tests.smallest import SETTINGS


@pytest.fixture
def metrics(registries):
    return register_metric


def top2(logits, labels):
    """Return the share of samples whose class is among the two likeliest."""
    assert (logits.dtype, labels.dtype, logits.device.type) == (torch.float32, torch.int64, "cpu")
    return (logits.topk(2).indices == labels[:, None]).any(1).double().mean()


def test_a_metric_stands_beside_the_ordinary_figures(metrics, make_data, make_config, tmp_path):
    seen = []
    metrics("top2")(top2)

    @metrics("right")
    def right(logits, labels):
        """Return the accuracy, computed again."""
        seen.append(len(labels))
        return float((logits.argmax(1) == labels).sum()) / len(labels)

    run(make_config("fedavg", rounds=2), out=tmp_path / "run", data=make_data())
    records = read_metrics(tmp_path / "run")
    for found in (*records, read_summary(tmp_path / "run")["metrics"]):
        for prefix in ("id_", "ood_", "validation_"):
            assert found[f"{prefix}right"] == found[f"{prefix}accuracy"]
            assert found[f"{prefix}accuracy"] <= found[f"{prefix}top2"] <= 1
    assert seen == [16, 16, 8] * 2  # whole test sets, once a round


def test_side_by_side_evaluation_gives_the_same_value(metrics, make_data, make_config, tmp_path):
    metrics("top2")(top2)
    for threads in (1, 3):
        config = make_config("fedavg", rounds=1, threads=threads, client_threads=1)
        run(config, out=tmp_path / str(threads), data=make_data())
    single, three = (read_metrics(tmp_path / str(threads))[0] for threads in (1, 3))
    assert single["id_top2"] == three["id_top2"]


def test_a_resumed_run_has_the_same_metrics(metrics, make_data, make_config, tmp_path):
    metrics("top2")(top2)
    config = make_config("fedavg", rounds=2)
    run(config, out=tmp_path / "whole", data=make_data())
    with pytest.raises(Kill):
        run(config, out=tmp_path / "run", data=make_data(), listener=KillAt("round", 1))
    run(load_settings(tmp_path / "run"), out=tmp_path / "run", resume=True, data=make_data())
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_metric_that_fails_leaves_no_run(metrics, make_data, make_config, refuses, tmp_path):
    for wrong, message in ((lambda a, b: 1 / 0, "ZeroDivisionError"), (lambda a, b: "many", "ValueError: could not")):
        wrong.__doc__ = "Wrong."
        metrics("wrong")(wrong)
        with refuses(f'The metric "wrong" fails on .* of 3 classes .{message}'):
            run(make_config("fedavg"), out=tmp_path / "run", data=make_data())


def test_an_ensemble_has_the_metric_of_its_answer(metrics, make_data, make_config, tmp_path):
    @metrics("right")
    def right(logits, labels):
        """Return the accuracy, computed again."""
        return (logits.argmax(1) == labels).double().mean()

    run(make_config("ensemble", rounds=None), out=tmp_path / "run", data=make_data())
    found = read_summary(tmp_path / "run")["metrics"]
    assert found["id_right"] == pytest.approx(found["id_accuracy"])


def test_other_tasks_and_other_figures_say_that_it_is_missing(metrics, make_data, make_pairs, make_config, tmp_path):
    metrics("top2")(top2)
    pairs = {**SETTINGS["feddra"], "rounds": 1}
    run(make_config("feddra", **pairs), out=tmp_path / "pairs", data=make_pairs())
    run(make_config("local", **SETTINGS.get("local", {"rounds": 1})), out=tmp_path / "local", data=make_data())
    for name in ("pairs", "local"):
        summary = read_summary(tmp_path / name)
        assert "The metric top2 is not computed" in summary["diagnostics"]["missing-metric"]
        assert not any("top2" in figure for figure in summary["metrics"])


def test_registering_wrongly(metrics):
    for name in ("Top2", "top-2", "2top", ""):
        with pytest.raises(ValueError, match="expected lower-case letters"):
            metrics(name)
    for name in ("accuracy", "loss", "macro_f1", "dice", "i2t_r5", "name", "seconds", "id_top2", "validation_top2"):
        with pytest.raises(ValueError, match="expected another name"):
            metrics(name)
    metrics("top2")(top2)
    metrics("top2")(top2)  # a notebook's cell, run again
    with pytest.raises(ValueError, match='metric "top2" is already registered'):

        @metrics("top2")
        def other(logits, labels):
            """Return another metric."""
