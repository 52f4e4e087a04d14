"""Tests of a run's listeners: one that raises is dropped, their states are kept, and their page runs."""

import os
import re
from pathlib import Path

import pytest
import torch

import fedkern
from fedkern.errors import UserError
from fedkern.listeners import Listener, Listeners
from fedkern.listeners.listener_group import ListenerGroup
from python_tests import own_data
from python_tests.interrupted import outcome


class Keeping(Listener):
    """Listener that keeps its rounds, and notes the states that it gets back."""

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
    """Listener that raises an error at one hook."""

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


def send_events(group, rounds):
    """Send listeners the events of a run of so many rounds."""
    group.on_start(None)
    for number in rounds:
        group.on_round_start(number, "train", [0])
        group.on_client(number, 0, {})
        group.on_round({"round": number})
        group.states()
    group.on_end({})
    group.close()


def test_states_of_a_checkpoint_go_on_and_those_of_absent_listeners_stay():
    outer, second = Keeping(), Keeping()
    group = ListenerGroup(Listeners(outer, Listeners(second)))
    send_events(group, (1, 2))
    assert (outer.closed, second.closed) == (1, 1)
    states = group.states()
    assert states == {"Keeping": {"rounds": [1, 2]}, "Keeping-2": {"rounds": [1, 2]}}
    without = ListenerGroup(Listener())
    without.restore_all(states)
    assert without.states() == states
    third, fourth = Keeping(), Keeping()
    group = ListenerGroup(Listeners(third, fourth))
    group.restore_all(without.states())
    assert third.given == fourth.given == {"rounds": [1, 2]}
    send_events(group, (3,))
    assert group.states()["Keeping-2"] == {"rounds": [1, 2, 3]}


@pytest.mark.parametrize("hook", ["on_start", "on_round_start", "on_client", "on_round", "state", "close", "on_end"])
def test_a_listener_that_raises_is_left_out(hook):
    warned, last = Warned(), Keeping()
    group = ListenerGroup(Listeners(warned, Broken(hook), last))
    send_events(group, (1, 2))
    line = next(
        number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "raise error" in text
    )
    when = "" if hook in ("on_start", "on_end", "close") else " in round 1"
    where = f"Broken (test_listener_group.py, line {line}) failed in {hook}{when}"
    text = f"The listener {where} (ValueError: no disk): the run goes on without it."
    assert warned.texts == group.warnings == {"listener-Broken": text}
    assert last.rounds == [1, 2]


@pytest.mark.parametrize("state", [[1], {1: 2}, {"a": (1,)}, {"a": float("nan")}, {"a": object()}])
def test_what_is_no_state(state):
    class Wrong(Listener):
        def state(self):
            return state

    group = ListenerGroup(Wrong())
    assert group.states() == {}
    assert "a dict" in group.warnings["listener-Wrong"] or "JSON" in group.warnings["listener-Wrong"]


@pytest.mark.parametrize(
    ("listener", "error"),
    [
        (Broken("on_start", UserError("Log in.")), UserError),  # nothing is lost yet
        (Broken("on_round", KeyboardInterrupt()), KeyboardInterrupt),
        (Broken("on_round", essential=True), ValueError),
    ],
    ids=["the user's", "Ctrl-C", "essential"],
)
def test_errors_that_end_the_run(listener, error):
    with pytest.raises(error):
        send_events(ListenerGroup(listener), (1,))


class Changing(Listener):
    """Listener that changes everything that it gets, and the modes of the process."""

    def ruin(self, *arguments):
        for table in arguments:
            for value in table.values() if isinstance(table, dict) else ():
                self.ruin(value)
            if isinstance(table, (dict, list)):
                table.clear()
        torch.set_grad_enabled(False), torch.set_default_dtype(torch.float64), torch.set_num_threads(2)
        torch.manual_seed(1), os.chdir("/")

    on_client = on_end = on_notice = on_round = on_round_start = on_warning = restore = ruin

    def on_start(self, run):
        self.ruin(run.config.options, run.test_sets)

    def state(self):
        self.ruin()
        return {"rounds": [1]}


def test_a_listener_that_changes_what_it_gets_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sites, test = own_data.table()
    torch.manual_seed(0)
    network = own_data.Rows()

    def play(name, *listeners):
        told = Keeping()
        told.on_client = told.on_round = told.on_round_start = lambda *about: told.rounds.append(repr(about))
        run = fedkern.simulate(
            "fedavg", data=sites, test=test, model=network, rounds=2, out=name, listener=[*listeners, told], workers=1,
            progress=False, pictures=False,
        )  # fmt: skip
        return outcome(run.out), len(told.rounds), told.rounds[0]

    assert play("plain") == play("changed", Changing())
    assert (Path.cwd(), torch.get_default_dtype()) == (tmp_path, torch.float32)


# -- listener page -----------------------------------------------------------------------------------------------------


PAGE = (Path(__file__).parents[2] / "docs/listeners.md").read_text()


def test_the_ten_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    quick = "fedkern.simulate(workers=1, local_steps=1, pictures=False, progress=False, method="
    exec(compile(code.replace("fedkern.simulate(", quick), "docs/listeners.md", "exec"), {})
    lines = [line.split(",") for line in (tmp_path / "runs/table/table.csv").read_text().splitlines()]
    assert [line[0] for line in lines] == ["1", "2"]
    assert all(0 <= float(line[1]) <= 1 for line in lines)


def test_every_event_is_on_the_page():
    named = re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE)
    events = [name for name, value in vars(Listener).items() if callable(value) and not name.startswith("__")]
    assert sorted(named) == sorted(events)
