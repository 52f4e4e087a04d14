"""FedIOD killed in the middle of its second stage and resumed: the bits of an uninterrupted run."""

import shutil

import pytest

from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.settings.stored import load_settings
from python_tests.interrupted import KillAt, outcome, play_killed

OPTIONS = {
    "ngf": 2, "ndf": 2, "batch": 4, "student_steps": 2, "iterations": 4, "w_real": 1.0, "w_balance": 0.5,
    "disc_weight": True, "models": "cnn:2,mlp:4,resnet8:2", "warmup": 0.5,
}  # fmt: skip
PRIVATE = {"epsilon": 50.0, "shards": 3, "histogram_noise": 2.0, "noise": "seed"}
ROUNDS = 3


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    known = {}

    def get(name, config, data):
        if name not in known:
            out = tmp_path_factory.mktemp("whole")
            run(config, out=out, data=data)
            known[name] = outcome(out)
        return known[name]

    return get


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["open", "private"])
@pytest.mark.parametrize(("round", "answers"), [(1, 4), (2, 0), (2, 9), (3, 13)])
def test_killed_in_the_second_stage(round, answers, name, make_data, make_config, tmp_path, reference):
    """The networks have three architectures.

    The warm-up ends within the second round.
    """
    options = OPTIONS if name == "open" else {**OPTIONS, **PRIVATE}
    data, config = make_data(), make_config("fediod", model="cnn", rounds=ROUNDS, grad_cam=0, options=options)
    expected = reference(name, config, data)
    play_killed(config, out=tmp_path, data=data, at=KillAt("client", answers, round))
    assert len(read_metrics(tmp_path)) == round - 1
    run(load_settings(tmp_path), out=tmp_path, resume=True, data=data)
    assert outcome(tmp_path) == expected
    assert read_metrics(tmp_path)[-1]["round"] == ROUNDS


def test_teachers_that_were_brought_are_not_asked_for_again(make_data, make_config, tmp_path):
    data, models = make_data(), {"models": OPTIONS["models"]}
    run(make_config("ensemble", model="cnn", rounds=None, grad_cam=0, options=models), out=tmp_path / "own", data=data)
    config = make_config("fediod", model="cnn", rounds=2, grad_cam=0, options=OPTIONS, teachers=str(tmp_path / "own"))
    run(config, out=tmp_path / "whole", data=data)
    play_killed(config, out=tmp_path / "run", data=data, at=KillAt("client", 5, round=2))
    shutil.rmtree(tmp_path / "own")
    run(config, out=tmp_path / "run", data=data, resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
