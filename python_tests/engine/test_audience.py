"""Listeners of a run: one that raises is left out, and states of listeners are kept with the checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedkern.engine.run import run
from fedkern.engine.store.records import read_summary
from fedkern.errors import UserError
from fedkern.listeners import Listener, Listeners
from python_tests.interrupted import Kill, KillAt, outcome, without


class Keeping(Listener):
    """Keeps the rounds that it heard of, and notes what it is given again."""

    def __init__(self):
        self.rounds, self.given, self.closed = [], None, 0

    def state(self):
        return {"rounds": self.rounds}

    def restore(self, state):
        self.rounds, self.given = list(state["rounds"]), dict(state)

    def on_round(self, record):
        self.rounds = [*self.rounds, record["round"]]

    def close(self):
        self.closed += 1


class Broken(Listener):
    """Raises an error at one hook."""

    def __init__(self, hook, error=None, **own):
        def fail(*_):
            raise error or ValueError("no\ndisk.")

        setattr(self, hook, fail)
        self.__dict__.update(own)


class Warned(Listener):
    def __init__(self):
        self.texts = {}

    def on_warning(self, name, text):
        assert name not in self.texts
        self.texts[name] = text


def test_states_go_on_with_a_resumed_run(make_config, make_data, tmp_path):
    data, config = make_data(), make_config(rounds=5, checkpoint_every=2)
    first, second = Keeping(), Keeping()
    with pytest.raises(Kill):
        run(config, out=tmp_path, data=data, listener=Listeners(first, Listeners(second), KillAt("round", round=3)))
    assert first.rounds == [1, 2, 3]
    assert first.closed > 0
    with pytest.raises(Kill):  # without the listeners, whose states stay
        run(config, out=tmp_path, data=data, resume=True, listener=KillAt("round", round=5))
    third, fourth = Keeping(), Keeping()
    run(config, out=tmp_path, data=data, resume=True, listener=Listeners(third, fourth))
    assert third.given == fourth.given == {"rounds": [1, 2]}
    assert third.rounds == [1, 2, 5]
    manifest = json.loads((tmp_path / "checkpoints" / "manifest.json").read_text())
    kept = manifest["entries"][-1]["info"]["parts"]["listeners"]
    assert kept == {"Keeping": {"rounds": [1, 2, 5]}, "Keeping-2": {"rounds": [1, 2, 5]}}


HOOKS = ["on_start", "on_round_start", "on_client", "on_round", "state", "close", "on_end"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_listener_that_raises_does_not_lose_the_run(hook, make_config, make_data, tmp_path, plain_run):
    warned, last = Warned(), Keeping()
    run(make_config(rounds=2), out=tmp_path, data=make_data(), listener=Listeners(warned, Broken(hook), last))
    line = next(
        number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "raise error" in text
    )
    when = "" if hook in ("on_start", "on_end", "close") else " in round 1"
    where = f"Broken (test_audience.py, line {line}) failed in {hook}{when}"
    text = f"The listener {where} (ValueError: no disk): the run goes on without it."
    assert warned.texts["listener-Broken"] == text
    assert last.rounds == [1, 2]
    found = outcome(tmp_path)
    told = hook not in ("on_end", "close")  # then the summary is written already
    assert (read_summary(tmp_path)["diagnostics"].get("listener-Broken") == text) == told
    assert (without(found, "listener-Broken") if told else found) == plain_run


@pytest.fixture
def plain_run(make_config, make_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    run(make_config(rounds=2), out=out, data=make_data())
    return outcome(out)


@pytest.mark.parametrize("state", [[1], {1: 2}, {"a": (1,)}, {"a": float("nan")}, {"a": object()}])
def test_what_is_no_state(state, make_config, make_data, tmp_path):
    class Wrong(Listener):
        def state(self):
            return state

    warned = Warned()
    run(make_config(rounds=1), out=tmp_path, data=make_data(), listener=Listeners(Wrong(), warned))
    assert "a dict" in warned.texts["listener-Wrong"] or "JSON" in warned.texts["listener-Wrong"]


@pytest.mark.parametrize(
    ("listener", "error"),
    [
        (Broken("on_start", UserError("Log in.")), UserError),  # nothing is lost yet
        (Broken("on_round", KeyboardInterrupt()), KeyboardInterrupt),
        (Broken("on_round", essential=True), ValueError),
    ],
    ids=["the user's", "Ctrl-C", "essential"],
)
def test_errors_that_end_the_run(listener, error, make_config, make_data, tmp_path):
    with pytest.raises(error):
        run(make_config(rounds=1), out=tmp_path / "run", data=make_data(), listener=listener)
    assert (tmp_path / "run").exists() == (error is not UserError)


def test_a_finished_run_is_told_to_sound_listeners(make_config, make_data, tmp_path):
    config, data = make_config(rounds=1), make_data()
    run(config, out=tmp_path, data=data)
    warned = Warned()
    summary = run(config, out=tmp_path, data=data, resume=True, listener=Listeners(Broken("on_end"), warned))
    assert summary["rounds"] == 1
    assert list(warned.texts) == ["listener-Broken"]
