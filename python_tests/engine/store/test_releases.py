"""A resumed private run repeats the releases before the interruption, or ends before it releases anything."""

import json
import shutil

import pytest
import torch

from fedkern.engine import client as engine_client
from fedkern.engine.local.training import Diverged
from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.releases import NAME, Releases
from fedkern.errors import UserError
from fedkern.messages.digest import digest
from fedkern.methods.fediod import client as fediod_client
from fedkern.methods.fediod import private_messages
from fedkern.settings.stored import load_settings
from python_tests.interrupted import KillAt, play_killed

OPTIONS = {
    "iterations": 2, "batch": 4, "ngf": 2, "ndf": 2, "student_steps": 1, "epsilon": 5.0,
    "class_weights": "uniform",
}  # fmt: skip


@pytest.fixture(params=[2])
def cut(request, played_once, make_data, make_config, tmp_path):
    """Return a run killed after client 0 of a round has sent its first gradients, and before client 1 has."""
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[privacy]')")
    data = make_data(two_tests=False)
    config = make_config("fediod", rounds=2, options=OPTIONS, grad_cam=0)

    def play(out):
        play_killed(config, out=out, data=data, at=KillAt("client", 4, round=request.param))

    shutil.copytree(played_once(f"cut{request.param}", play), tmp_path / "cut")

    def go_on():
        return run(load_settings(tmp_path / "cut"), out=tmp_path / "cut", resume=True, data=data)

    return tmp_path / "cut", go_on


def read_releases(out):
    return [json.loads(line) for line in (out / "checkpoints" / NAME).read_text().splitlines()]


def test_what_is_released_again_counts_once(cut):
    out, go_on = cut
    plan = Checkpoints(out).peek()["plan"]
    before = read_releases(out)
    assert [row[1:3] for row in before if row[0] == plan] == [["images 0", 0], ["images 0", 1], ["images 0", 2],
                                                              ["gradients 0", 0], ["gradients 0", 1]]  # fmt: skip
    assert 0.99 * 5 < go_on()["privacy"]["epsilon_covered"] <= 5  # what all releases of the plan cost once
    # What a kept checkpoint would replay is there, nothing older.
    entries = Checkpoints(out)._read_manifest()
    rows = read_releases(out)
    assert {row[0] for row in rows} == {entries[0]["plan"]}
    assert [row for row in rows if row[0] == plan][:5] == [row for row in before if row[0] == plan]


@pytest.mark.parametrize("cut", [1], indirect=True)
def test_secrets_are_kept_before_the_first_round_that_may_be_cut(cut):
    assert cut[1]()["rounds"] == 2


def test_another_processor_device_or_version_is_refused_before_anything_leaves(cut, monkeypatch):
    """The last bits would differ, and the same noise on both values would reveal the difference."""
    out, go_on = cut
    handed, rows, before = [], fediod_client.Answers._realism_rows, read_releases(out)

    def others(self, pending, k):
        return rows(self, pending, k) * (1 + 2**-12)

    update = private_messages.sanitise
    monkeypatch.setattr(fediod_client.Answers, "_realism_rows", others)
    monkeypatch.setattr(private_messages, "sanitise", lambda *a: handed.append(a) or update(*a))
    with pytest.raises(UserError, match=r"after client 0 had released its answer, and what would be released in its"):
        go_on()
    assert len(handed) == 1
    assert read_releases(out) == before
    monkeypatch.undo()
    with monkeypatch.context() as patch:  # other noise on the same answer, as of another stream or a lost secret
        patch.setattr(private_messages, "secret", lambda client, options: "0" * 32)
        with pytest.raises(UserError, match="differs: both together would tell more than epsilon says"):
            go_on()
    assert go_on()["rounds"] == 2  # where it was interrupted it still can


def test_a_run_without_an_epsilon_keeps_no_releases(make_data, make_config, tmp_path):
    run(make_config("fedavg", rounds=1, grad_cam=0), out=tmp_path / "run", data=make_data())
    assert not (tmp_path / "run" / "checkpoints" / NAME).exists()


def test_the_file_of_releases(tmp_path):
    releases = Releases(tmp_path)
    releases.open(0)
    for plan in (0, 1, 2):
        releases.add(plan, "update", 3, {"x": torch.ones(2)})
    releases.forget(1)
    with (tmp_path / NAME).open("a") as file:
        file.write('[2, "update", 4, "0123')  # the process died while it wrote: that message never left
    again = Releases(tmp_path)
    again.open(2)
    again.add(2, "update", 4, {"x": torch.zeros(2)})
    again.add(2, "update", 3, {"x": torch.ones(2)})
    assert [row[:3] for row in map(json.loads, (tmp_path / NAME).read_text().splitlines())] == [
        [1, "update", 3], [2, "update", 3], [2, "update", 4],
    ]  # fmt: skip
    last = Releases(tmp_path)
    last.open(1)
    with pytest.raises(UserError, match="client 3 had released"):
        last.add(1, "update", 3, {"x": torch.ones(2, dtype=torch.float64)})
    (tmp_path / NAME).write_text("[1\n")
    with pytest.raises(UserError, match=r"releases.jsonl is damaged .*start it again in a new folder"):
        Releases(tmp_path).open(0)


def test_a_digest_tells_names_kinds_shapes_and_bits_apart():
    x = torch.arange(6.0)
    different = [
        {"x": x}, {"y": x}, {"x": x.view(2, 3)}, {"x": x.double()}, {"x": x.int()}, {"x": x.bfloat16()}, {"x": x[:0]},
        {"x": x, "y": 1}, {"x": x, "y": 1.0}, {"x": {"x": x}}, {"x": [x]}, {"x": torch.nextafter(x, x + 1)}, {},
        "diverged",
    ]  # fmt: skip
    assert len({digest(message) for message in different}) == len(different)
    assert digest({"a": 1, "b": x[::2]}) == digest({"b": x[::2].clone(), "a": 1})


def test_what_a_client_spent_before_it_diverged_stays_booked(make_data, make_config, tmp_path, monkeypatch):
    """With --on-nan skip the client is left out, but its noise counts in the run's figure."""
    pytest.importorskip("opacus", reason="opacus is not installed (pip install '.[privacy]')")
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[privacy]')")
    train = engine_client.train_privately

    def diverging(client, method, phase, *arguments):
        train(client, method, phase, *arguments)
        if client.id == 1:
            raise Diverged(1, phase.round, 1, "the parameters are not finite")

    monkeypatch.setattr(engine_client, "train_privately", lambda *a: diverging(*a) or {})
    options = {**OPTIONS, "teacher_dp": True}
    config = make_config("fediod", model="cnn-gn", width=4, rounds=1, options=options, grad_cam=0, on_nan="skip")
    summary = run(config, out=tmp_path / "run", data=make_data(two_tests=False))
    assert "diverging-client" in summary["diagnostics"]
    assert all(summary["privacy"]["clients"][str(k)]["channels"]["teacher"] > 0 for k in range(3))
