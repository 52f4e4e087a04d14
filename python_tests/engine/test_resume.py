"""An interrupted and resumed run gives the bits of an uninterrupted one, wherever it was interrupted."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.errors import UserError
from fedkern.listeners import Listener, Listeners
from fedkern.methods import METHODS, FedAvg, FedGID, Round
from fedkern.process.interrupts import Terminated
from fedkern.settings.config import load_settings
from python_tests.hearing import Hearing
from python_tests.interrupted import (
    KillAt,
    kill_and_resume,
    kill_often,
    killed_at_rename,
    lose,
    outcome,
    play_killed,
    without,
)

STATEFUL = {"buffers": "local", "sample_fraction": 0.6, "rounds": 4}
PLAIN = {"rounds": 4}


class WithSetUp(FedGID):
    """FedGID with a set-up round, whose sum every client keeps."""

    def rounds(self, federation):
        yield Round("set-up", ("collect", "distribute"), participants="all", one_off=True)
        yield from super().rounds(federation)

    def send(self, server, phase):
        if phase.name == "set-up":
            return {} if phase.exchange == "collect" else {"sum": server.round_cache["sum"]}
        return super().send(server, phase)

    def client_update(self, client, phase, message):
        if phase.name != "set-up":
            assert client.state["sum"] == 3.0
            return super().client_update(client, phase, message)
        client.state.update(message)
        return {"one": torch.ones(())} if phase.exchange == "collect" else {}

    def expects(self, server, phase, client, message):
        if phase.name != "set-up":
            return super().expects(server, phase, client, message)
        return {"one": torch.ones(())} if phase.exchange == "collect" else {}

    def server_update(self, server, phase, uploads):
        if phase.name != "set-up":
            super().server_update(server, phase, uploads)
        elif phase.exchange == "collect":
            server.round_cache["sum"] = torch.stack([upload.message["one"] for upload in uploads]).sum()
        else:
            assert len(list(uploads)) == 3


@pytest.fixture
def with_set_up(monkeypatch):
    monkeypatch.setitem(METHODS, "fedgid", WithSetUp)


@pytest.fixture
def reference(played_once):
    return lambda name, config, data: outcome(played_once(name, lambda out: run(config, out=out, data=data)))


@pytest.mark.usefixtures("with_set_up")
@pytest.mark.sampled(2)
@pytest.mark.parametrize("settings", [PLAIN, STATEFUL], ids=["plain", "stateful"])
@pytest.mark.parametrize(
    ("hook", "count"),
    [("round-start", 0), ("client", 1), ("round", 0), ("round-start", 2), ("client", 7), ("round", 3), ("end", 0)],
)
def test_killed_at_a_hook(settings, hook, count, make_data, make_config, tmp_path, reference):
    data, config = make_data(), make_config("fedgid", **settings)
    expected = reference(f"hook-{len(settings)}", config, data)
    assert kill_and_resume(config, out=tmp_path, data=data, at=KillAt(hook, count)) == expected


@pytest.mark.usefixtures("with_set_up")
@pytest.mark.sampled(2)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("count", range(0, 15, 2))
def test_killed_around_every_file(count, when, make_data, make_config, tmp_path, reference):
    """The run dies before or after the rename of the count-th file: server, clients, manifest, model, summary ..."""
    data, config = make_data(), make_config("fedgid", **{**STATEFUL, "rounds": 2})
    expected = reference("files", config, data)
    with killed_at_rename(count, when):
        run(config, out=tmp_path, data=data)
    if not (tmp_path / "config.toml").exists():  # died before the folder was a run folder
        run(config, out=tmp_path, data=data)
    else:
        run(load_settings(tmp_path), out=tmp_path, resume=True, data=data)
    assert outcome(tmp_path) == expected
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.usefixtures("with_set_up")
def test_killed_again_and_again(make_data, make_config, tmp_path, reference):
    data, config = make_data(), make_config("fedgid", **STATEFUL)
    expected = reference(f"hook-{len(STATEFUL)}", config, data)
    assert kill_often(config, out=tmp_path, data=data, at=lambda attempt: KillAt("client", 6)) >= 2
    assert outcome(tmp_path) == expected


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_resumes(method, make_small, tmp_path):
    needs_all = METHODS[method].one_shot or method == "local"  # all clients take part
    config, data = make_small(method, 3, **({} if needs_all else {"sample_fraction": 0.67}))
    run(config, out=tmp_path / "whole", data=data)
    cut = tmp_path / "cut"
    assert kill_often(config, out=cut, data=data, at=lambda attempt: KillAt("client", 1 + 2 * attempt))
    assert outcome(cut) == outcome(tmp_path / "whole")
    read_model(cut, client=0 if METHODS[method].keeps_head else None)


def test_sparse_checkpoints_and_evaluation(make_data, make_config, tmp_path):
    data = make_data()
    config = make_config(rounds=7, checkpoint_every=3, eval_every=2, buffers="local")
    run(config, out=tmp_path / "whole", data=data)
    play_killed(config, out=tmp_path / "cut", data=data, at=KillAt("client", 16))
    assert Checkpoints(tmp_path / "cut").peek()["round"] == 3
    run(config, out=tmp_path / "cut", resume=True, data=data)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(make_data, make_config, tmp_path):
    data, config = make_data(), make_config(rounds=4)
    run(config, out=tmp_path / "whole", data=data)
    play_killed(config, out=tmp_path / "cut", data=data, at=KillAt("round-start", 3))
    entry = Checkpoints(tmp_path / "cut").peek()
    assert entry["round"] == 3
    file = tmp_path / "cut" / "checkpoints" / entry["server"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    listener = Hearing()
    run(config, out=tmp_path / "cut", resume=True, data=data, listener=listener)
    assert listener.info.first_round == 2
    told = listener.warnings["damaged-checkpoint"]
    assert f"({entry['server']} of round 3): the run goes on from the one of round 2" in told
    assert without(outcome(tmp_path / "cut"), "damaged-checkpoint") == outcome(tmp_path / "whole")


def test_a_finished_run_returns_its_summary_without_data(make_data, make_config, tmp_path):
    config = make_config(rounds=1)
    summary = run(config, out=tmp_path, data=make_data())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = run(load_settings(tmp_path), out=tmp_path, resume=True)
    assert again == json.loads(json.dumps(summary))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before

    class Deaf(Listener):
        def on_end(self, summary):
            raise ValueError("no disk")

    heard = Hearing()
    assert run(config, out=tmp_path, resume=True, listener=Listeners(Deaf(), heard)) == again
    assert [*heard.warnings] == ["listener-Deaf"]


def test_a_lost_summary_is_made_again(make_data, make_config, tmp_path):
    run(make_config("fedgid"), out=tmp_path, data=make_data())
    before = outcome(tmp_path)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    run(load_settings(tmp_path), out=tmp_path, resume=True, data=make_data())
    assert outcome(tmp_path) == before


def test_other_settings_are_refused_and_named(make_data, make_config, tmp_path):
    config = make_config("fedgid")
    play_killed(config, out=tmp_path, data=make_data(), at=KillAt("round", 0))
    for change, words in (
        ({"lr": 0.5}, r"lr: 0\.05 -> 0\.5"),
        ({"options": {**config.options, "alpha": 0.9}}, r"options\.alpha: 0\.6 -> 0\.9"),
        ({"threads": 2}, r"threads: 1 -> 2"),
    ):
        with pytest.raises(UserError, match=words):
            run(config.replace(**change), out=tmp_path, resume=True, data=make_data())


def test_not_a_run_folder(make_config, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        run(make_config(), out=tmp_path, resume=True)


def test_other_data_and_a_damaged_manifest_are_one_sentence(make_data, make_config, tmp_path):
    play_killed(make_config(), out=tmp_path, data=make_data(), at=KillAt("client", 4))
    with pytest.raises(UserError, match="data are not those"):
        run(make_config(), out=tmp_path, resume=True, data=make_data(seed=1))
    (tmp_path / "checkpoints" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        run(make_config(), out=tmp_path, resume=True, data=make_data())


def test_thread_count_is_stored_restored_and_given_back(make_data, make_config, tmp_path):
    before = torch.get_num_threads()
    seen = []
    heard = Hearing(on_client=lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(1)
    try:
        run(make_config(threads=2, rounds=1, batch_size=20), out=tmp_path, data=make_data(), listener=heard)
        assert set(seen) == {2}
        assert torch.get_num_threads() == 1
        assert load_settings(tmp_path).threads == 2
    finally:
        torch.set_num_threads(before)


def test_sigterm_is_an_interrupt_of_its_own(make_data, make_config, tmp_path):
    deadly = Hearing(on_client=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as caught:
        run(make_config(), out=tmp_path, data=make_data(), listener=deadly)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_was_lost_ends_the_run_at_that_batch(number, kind, make_data, make_config, tmp_path, monkeypatch):
    calls = []

    class Loses(FedAvg):
        def loss(self, model, batch, received):
            calls.append(received.phase.round)
            if received.phase.round == 1:
                lose(number)
            return super().loss(model, batch, received)

    monkeypatch.setitem(METHODS, "fedavg", Loses)
    with pytest.raises(kind):
        run(make_config(rounds=4), out=tmp_path, data=make_data())
    assert calls.count(1) == 1
    assert Checkpoints(tmp_path).peek()["round"] == 1


@pytest.mark.parametrize("named", ["clients", "classes"])
def test_names_that_have_changed_since_are_a_sentence(named, make_data, make_config, tmp_path):
    data = dataclasses.replace(make_data(), client_names=("north", "south", "west"))
    play_killed(make_config(rounds=3), out=tmp_path, data=data, at=KillAt("round", 1))
    field = {"clients": "client_names", "classes": "classes"}[named]
    renamed = dataclasses.replace(data, **{field: (*getattr(data, field)[:-1], "other")})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"The {named} of the data have other names than when the run .*put the names"):
        run(load_settings(tmp_path), out=tmp_path, data=renamed, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert run(load_settings(tmp_path), out=tmp_path, data=data, resume=True)["rounds"] == 3
