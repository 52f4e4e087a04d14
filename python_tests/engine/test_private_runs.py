"""Whole private runs of FedIOD: a target is met, a killed run ends with the same bits, pictures and figures."""

import json

import pytest

from fedkern.engine import Listener, RunConfig, read_shown, run, shown

pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install 'fedkern[privacy]')")

SMALL = {"iterations": 2, "batch": 4, "ngf": 2, "ndf": 2, "nz": 4, "student_steps": 1, "histogram_noise": 5.0}
NOISED = {**SMALL, "sigma_d": 9.0, "shards": 3}
WHOLE = {**SMALL, "epsilon": 8.0, "teacher_dp": True}


class Kill(BaseException):
    pass


class KillAfter(Listener):
    def __init__(self, round):
        self.round = round

    def on_round_start(self, round, name, participants):
        if round == self.round:
            raise Kill


@pytest.mark.parametrize("options", [NOISED, WHOLE], ids=["noised", "private teachers"])
def test_a_killed_run_releases_the_same(options, make_data, make_config, tmp_path):
    if "teacher_dp" in options:
        pytest.importorskip("opacus", reason="opacus is not installed (pip install 'fedkern[privacy]')")
    data = make_data(two_tests=False)
    config = make_config("fediod", model="cnn-gn", width=4, rounds=3, options=options, grad_cam=0)
    summary = run(config, out=tmp_path / "whole", data=data)
    with pytest.raises(Kill):
        run(config, out=tmp_path / "cut", data=data, listener=KillAfter(3))
    again = run(RunConfig.load(tmp_path / "cut"), out=tmp_path / "cut", resume=True, data=data)
    for name in ("model.safetensors", shown.FILE):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert again["privacy"] == summary["privacy"]
    assert again["metrics"] == summary["metrics"]

    private = json.loads((tmp_path / "whole" / "summary.json").read_text())["privacy"]
    if "epsilon" in options:
        assert 7.5 < private["epsilon"] <= 8.0
    else:
        assert summary["metrics"]["epsilon"] == private["epsilon"] > private["channels"]["discriminator"] > 0
    assert set(private["channels"]) == {"histogram", "discriminator", *(["teacher"] if "teacher_dp" in options else [])}
    assert ("so the released generator and student" in private["statement"]) == ("teacher_dp" in options)
    assert ("teachers-uncovered" in summary["diagnostics"]) == ("teacher_dp" not in options)
    assert {entry.name for entry in read_shown(tmp_path / "whole")} == {"generated", "teacher_weights", "agreement"}


def test_the_pictures_are_what_they_say(make_data, make_config, tmp_path):
    options = {"iterations": 1, "batch": 4, "ngf": 2, "ndf": 2, "nz": 4, "student_steps": 1, "disc_weight": False}
    data = make_data(two_tests=False)
    run(make_config("fediod", rounds=1, options=options, grad_cam=0), out=tmp_path / "run", data=data)
    entries = {entry.name: entry.value for entry in read_shown(tmp_path / "run")}
    assert entries["generated"].shape == (4, 3, 8, 8)
    counts = data.statistics.counts
    assert entries["teacher_weights"].numpy() == pytest.approx(counts / counts.sum(0), rel=1e-5)
    agreement = entries["agreement"]
    assert agreement.shape == (3, 3)
    assert (agreement.diagonal() == 1).all()
    assert (agreement == agreement.T).all()
