"""Parts that write what happened round by round, each on its own: no run is played."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedkern.engine.ledger import Ledger
from fedkern.engine.parts.artifacts import Artifacts
from fedkern.engine.parts.base import Part, Summary
from fedkern.engine.parts.listening import Listening
from fedkern.engine.parts.privacy import Privacy
from fedkern.engine.parts.records import Records
from fedkern.engine.parts.server_figures import ServerFigures
from fedkern.engine.parts.traffic import Traffic
from fedkern.engine.parts.warnings import Warnings
from fedkern.engine.progress import Progress
from fedkern.engine.store.artifacts import FILE, ArtifactLog
from fedkern.engine.store.records import Metrics
from fedkern.engine.timing import Timing
from fedkern.errors import UserError
from fedkern.listeners.events import Listener, Listeners
from fedkern.listeners.listener_group import ListenerGroup
from fedkern.methods.base import Phase, Round
from fedkern.privacy import Guarantee, server_secret
from fedkern.privacy.disclosure import About, Disclosure
from python_tests.stand_ins import PRIVATE, Context, about, record, stored, values

TRAIN = Phase(0, "train", "update")
GUARANTEE = Guarantee(1e-5, {"networks": "the networks"})


def test_a_part_that_overrides_nothing_does_nothing():
    part, one, summary = Part(), record(), Summary(nn.Identity())
    part.begin(resumed=False)
    assert part.before_round(one) is None
    assert part.round_end(one) is None
    part.finish(summary)
    part.restore({})
    part.close()
    assert part.state() == {}
    assert (one.entries, summary.entries, summary.metrics) == ({}, {}, {})


# -- records -----------------------------------------------------------------------------------------------------------


class Noted:
    """A part of records with what it is made of."""

    def __init__(self, out, **context):
        self.context, self.log, self.timing = Context(**context), SimpleNamespace(dropped=[]), Timing()
        self.metrics = Metrics(out)
        self.part = Records(self.metrics, self.context, self.log, self.timing)

    def round(self, number, **given):
        """Plays a round; returns its record."""
        played = record(number, seconds={"train": 2.0}, clients={"1": {"loss": 0.5}}, **given)
        self.part.before_round(played)
        self.part.round_end(played)
        return played

    def lines(self):
        return [json.loads(line) for line in self.metrics.path.read_text().splitlines()]


@pytest.mark.parametrize("private", [False, True])
def test_a_record_says_what_may_be_told(private, tmp_path):
    noted = Noted(tmp_path, disclosure=PRIVATE if private else None)
    noted.context.data.client_names = ("x", "y")
    noted.part.begin(resumed=False)
    noted.log.dropped = [{"round": 1, "client": 0}]
    one = noted.round(1, due=True)
    assert about(one, About.CLIENTS) == {"clients"}
    assert values(one)["clients"] == {"1": {"name": "y", "loss": 0.5}}
    assert ("clients" in one.public) is not private
    assert (one.public["round"], one.public["rounds"], one.public["evaluated"], one.public["name"]) == (
        1,
        3,
        True,
        "train",
    )
    assert one.public["dropped"] == [{"round": 1, "client": 0}]
    (line,) = noted.lines()
    assert line.keys() == one.public.keys() - {"rounds", "evaluated"}
    assert line["phases"] == {"train": 2.0}
    assert 0 <= line["round_seconds"] <= line["seconds"] + 1
    assert line["seconds"] > 0
    assert noted.round(-1).entries == {}  # which is no communication round
    assert "dropped" not in noted.round(2).public  # told once
    assert [line["round"] for line in noted.lines()] == [1, 2]
    assert noted.timing.phases == {"train": 4.0}


def test_what_records_do_at_the_end_of_a_run(tmp_path):
    noted = Noted(tmp_path)
    noted.round(1)
    noted.log.dropped = [{"round": 1, "client": 0}]
    summary = Summary(nn.Identity())
    noted.part.finish(summary)
    assert summary.entries == {"phases": {"train": 2.0}, "dropped": [{"round": 1, "client": 0}]}


def test_records_go_on_from_a_checkpoint(tmp_path):
    noted = Noted(tmp_path)
    noted.part.begin(resumed=False)
    noted.round(1)
    noted.log.dropped = [{"round": -1, "client": 2}]
    state = stored(noted.part.state())
    noted.round(2)  # after the checkpoint
    state["seconds"] = 1000.0
    again = Noted(tmp_path)
    again.part.restore(state)
    again.part.begin(resumed=True)
    assert [line["round"] for line in again.lines()] == [1]
    assert again.log.dropped == [{"round": -1, "client": 2}]
    assert again.timing.seconds() >= 1000
    assert again.part.state()["sha256"] == state["sha256"]
    again.round(2)
    assert [line["round"] for line in again.lines()] == [1, 2]
    assert again.timing.phases == {"train": 4.0}
    again.part.begin(resumed=False)  # a run that begins anew
    assert again.lines() == []
    with pytest.raises(UserError, match="has lost rounds that the checkpoint has"):
        again.part.restore(state)


# -- figures of the server ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True])
def test_figures_that_the_server_reports(told):
    server, disclosure = SimpleNamespace(report={}), Disclosure(False, told)
    part, setup, one = ServerFigures(server, disclosure), record(-1), record()
    part.restore({"norm": 1, "spread": None})
    part.round_end(setup)
    part.round_end(one)
    assert setup.entries == {}
    assert about(one, About.SERVER) == {"norm", "spread"}
    assert server.report["norm"] == 1.0
    assert type(server.report["norm"]) is float
    assert server.report["spread"] != server.report["spread"]  # NaN, which a resumed run gets as None
    summary = Summary(nn.Identity())
    part.finish(summary)
    assert summary.metrics.keys() == ({"norm", "spread"} if told else set())


def test_the_servers_figures_go_on_from_a_checkpoint():
    part = ServerFigures(SimpleNamespace(report={"norm": 1.0}), Disclosure())
    again = ServerFigures(SimpleNamespace(report={}), Disclosure())
    again.restore(stored(part.state()))
    assert again.state() == {"norm": 1.0}


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), np.float64(0.5)])
def test_numbers_that_the_server_reports_become_pythons(value):
    server, one = SimpleNamespace(report={"x": value}), record()
    ServerFigures(server, Disclosure()).round_end(one)
    assert type(server.report["x"]) is float
    assert values(one) == {"x": 0.5}


@pytest.mark.parametrize("value", [None, "0.5", [0.5], np.zeros(2), 1j])
def test_what_the_server_reports_must_be_numbers(value):
    server, one = SimpleNamespace(report={"x": value}), record()
    with pytest.raises(UserError, match=r'server.report\["x"\] must be a number, not .*: report a number, or leave'):
        ServerFigures(server, Disclosure()).round_end(one)
    assert one.entries == {}


@pytest.mark.parametrize("name", ["accuracy", "round", "seconds"])
def test_the_server_may_report_no_name_of_the_engines(name):
    one = record()
    one.put({"accuracy": 0.5})
    part = ServerFigures(SimpleNamespace(report={name: 1.0}), Disclosure())
    with pytest.raises(UserError, match=rf'server.report\["{name}"\] has a name of the engine\'s: choose one besides'):
        part.round_end(one)


# -- artifacts ---------------------------------------------------------------------------------------------------------


def showing(out, told=True, done=0):
    server = SimpleNamespace(showing=None, artifacts={})
    return server, Artifacts(server, ArtifactLog(out, 16), Progress(done=done), told)


def test_which_rounds_the_server_shows(tmp_path):
    for told in (False, True):
        server, part = showing(tmp_path, told)
        seen = {}
        for number in (-1, 1, 2, 3):
            part.before_round(record(number))
            seen[number] = server.showing
        assert seen == {-1: False, 1: told, 2: told, 3: False}


def test_pictures_go_on_from_a_checkpoint(tmp_path):
    server, part = showing(tmp_path)
    for number in (1, 2):
        server.artifacts["weights"] = torch.full((2, 2), float(number)), ("client", "class")
        part.round_end(record(number))
        assert server.artifacts == {}
        if number == 1:
            state = stored(part.state())
    assert part.state() != state  # and writes the file with both
    _, again = showing(tmp_path, done=1)
    again.restore(state)
    assert again.state() == state
    _, other = showing(tmp_path, done=2)
    with pytest.raises(UserError, match=f"{FILE} is not what the run wrote"):
        other.restore(state)


# -- warnings and listeners --------------------------------------------------------------------------------------------


class Hearing(Listener):
    """Notes its events; fails in one of them."""

    def __init__(self, fails=""):
        self.events, self.kept, self._fails = [], {}, fails

    def _note(self, *event):
        self.events.append(event)
        if event[0] == self._fails:
            raise RuntimeError("the disk is full")

    def on_warning(self, name, text):
        self._note("warning", name, text)

    def on_start(self, run):
        self._note("start", run)

    def on_notice(self, text):
        self._note("notice", text)

    def on_round_start(self, round, name, participants):
        self._note("round start", round, name, participants)

    def on_round(self, record):
        self._note("round", record)

    def state(self):
        return dict(self.kept)

    def restore(self, state):
        self.kept = state


def test_every_warning_is_told_once():
    context, heard = Context(), Hearing()
    part = Warnings(context, ListenerGroup(heard))
    context.warn("setup", "It is slow.")
    part.round_end(record(-1))
    assert heard.events == []  # with the first communication round
    part.round_end(record(1))
    context.warn("setup", "It is still slow.")
    part.round_end(record(2))
    state = stored(part.state())
    context.warn("late", "It is late.")
    summary = Summary(nn.Identity())
    part.finish(summary)
    assert heard.events == [("warning", "setup", "It is slow."), ("warning", "late", "It is late.")]
    assert summary.entries == {"diagnostics": {"setup": "It is slow.", "late": "It is late."}}
    resumed, again = Context(), Hearing()
    part = Warnings(resumed, ListenerGroup(again))
    part.restore(state)
    part.round_end(record(3))
    assert again.events == []
    assert resumed.warnings == {"setup": "It is slow."}


def test_warnings_about_listeners_stand_beside_the_others():
    context, broken, other = Context(), Hearing("round"), Hearing()
    listeners = ListenerGroup(Listeners(broken, other))
    listeners.on_round({"round": 1})
    part = Warnings(context, listeners)
    part.round_end(record())
    assert [*context.warnings] == ["listener-Hearing"]
    assert [event[0] for event in other.events] == ["warning", "round"]  # told at once, and not again


def test_listeners_hear_of_rounds_what_may_be_told():
    heard, info = Hearing(), SimpleNamespace(rounds=3)
    part = Listening(ListenerGroup(heard), lambda: info)
    part.begin(resumed=False)
    setup = record(-1, entry=Round("setup", one_off=True, trains="generator"))
    one = record(1, entry=Round("train", trains="network"))
    one.put({"secret": 1.0}, About.CLIENTS)
    one.public = {"round": 1}
    for each in (setup, one):
        part.before_round(each)
        part.round_end(each)
    assert heard.events == [
        ("start", info),
        ("round start", -1, "setup", [0, 1]), ("notice", "set-up: generator"),
        ("round start", 1, "train", [0, 1]), ("round", {"round": 1}),
    ]  # fmt: skip


def test_listeners_go_on_from_a_checkpoint():
    heard, again = Hearing(), Hearing()
    heard.kept = {"id": "a1"}
    Listening(ListenerGroup(again), lambda: None).restore(stored(Listening(ListenerGroup(heard), lambda: None).state()))
    assert again.kept == {"id": "a1"}


# -- bytes -------------------------------------------------------------------------------------------------------------


class Booked:
    """A part of traffic of two clients with what it is made of."""

    def __init__(self, *, tabled=False, rows=None, wire=None, secret=False, shared_words=False):
        self.ledger, self.context, self.server = Ledger(2), Context(2), SimpleNamespace(traffic=None)
        self.context.words = lambda: ([{"words": ["red"]}, {"words": ["blue"]}], {"words": ["red", "blue"]})
        checkpoints = SimpleNamespace(tabled=tabled, booked=lambda: rows)
        self.part = Traffic(self.ledger, self.context, self.server, checkpoints, {} if wire is None else wire,
                            shared_words=shared_words, secret=secret)  # fmt: skip


@pytest.mark.parametrize("resumed", [False, True])
def test_what_travels_before_any_round_is_booked_once(resumed):
    booked = Booked(shared_words=True)
    booked.context.uploaded = [{"x": 1}, {"x": 1, "y": 2}]
    booked.part.begin(resumed=resumed)
    assert booked.context.uploaded == []
    assert booked.server.traffic is booked.ledger.rounds
    assert booked.ledger.one_off_up == ([0, 0] if resumed else [8 + 3, 16 + 4])
    assert booked.ledger.one_off_down == ([0, 0] if resumed else [7, 7])


def test_bytes_of_a_round_and_of_its_exchanges():
    booked = Booked()
    one = record(1, exchanges=("update", "statistics", "nothing"))
    booked.ledger.book(0, "up", [0] * 9, phase=TRAIN)
    booked.part.before_round(one)
    booked.ledger.book(0, "up", [0] * 2, phase=TRAIN)
    booked.ledger.book(1, "down", [0], phase=Phase(0, "train", "statistics"))
    booked.part.round_end(one)
    assert values(one) == {
        "bytes_up": 88, "bytes_down": 8, "round_bytes_up": 16, "round_bytes_down": 8,
        "bytes": {
            "train/update": {"up": 16, "down": 0}, "train/statistics": {"up": 0, "down": 8},
            "train/nothing": {"up": 0, "down": 0},
        },
    }  # fmt: skip
    assert len(about(one, About.RUN)) == 5
    single, setup = record(2, exchanges=("update",)), record(-1)
    for each in (single, setup):
        booked.part.before_round(each)
        booked.part.round_end(each)
    assert single.entries.keys() == one.entries.keys() - {"bytes"}
    assert setup.entries == {}


@pytest.mark.parametrize("secret", [False, True])
def test_bytes_of_a_run(secret):
    booked = Booked(secret=secret, wire={"up": 100} if secret else None)
    booked.ledger.book(1, "up", [0], phase=TRAIN)
    summary = Summary(nn.Identity())
    booked.part.finish(summary)
    assert summary.entries["bytes"]["total"] == 8
    assert ("clients" in summary.entries["bytes"]) is not secret  # they tell who took part
    assert summary.entries.get("wire") == ({"up": 100} if secret else None)


@pytest.mark.parametrize(("before", "after"), [(False, False), (False, True), (True, True)])
def test_bytes_go_on_from_a_checkpoint(before, after):
    booked = Booked(tabled=before, wire={"up": 100})
    booked.ledger.book(1, "up", [0], phase=TRAIN)
    state, wire = stored(booked.part.state()), {}
    again = Booked(tabled=after, rows={1: (8, 0, 0, 0)} if before else {1: (9999, 0, 0, 0)}, wire=wire)
    again.part.restore(state)
    assert again.ledger.summary() == booked.ledger.summary()
    assert wire == {"up": 100}
    assert ("up" in state["ledger"]) is not before  # the table has it


# -- privacy -----------------------------------------------------------------------------------------------------------


class Kept:
    """A part of privacy with what it is made of."""

    def __init__(self, out, *, said=GUARANTEE, private=True, rounds=3, draws="seed"):
        self.calls, self.context = [], Context(dp_draws=draws, trained_clients=2)
        report = {"epsilon": 2.0, "delta": 1e-5, "clip": 1.0}
        self.private = SimpleNamespace(
            planned=rounds / 2, secret="", spent=lambda rounds: {"epsilon": rounds / 2}, report=lambda rounds: report
        )
        self.private.keep = lambda secret: setattr(self.private, "secret", secret)
        checkpoints = SimpleNamespace(
            folder=out, write_at_once=lambda: self.calls.append("at once"), client_state=lambda k: {}
        )
        releases = None if said is None else SimpleNamespace(open=lambda plan: self.calls.append(f"open {plan}"))
        self.part = Privacy(said, self.private if private else None, releases, self.context, checkpoints,
                            Progress(done=2, planned=4), rounds)  # fmt: skip


@pytest.mark.parametrize("draws", ["seed", "secret"])
def test_what_a_private_run_needs_before_it_releases_anything(draws, tmp_path):
    kept = Kept(tmp_path, draws=draws)
    kept.part.begin(resumed=False)
    assert kept.calls == ["open 4", "at once"]
    assert kept.private.secret == (server_secret.read(tmp_path) if draws == "secret" else "")
    again = Kept(tmp_path, draws=draws)
    again.part.begin(resumed=True)
    assert again.private.secret == kept.private.secret
    public = Kept(tmp_path, said=None, private=False)
    public.part.begin(resumed=False)
    assert public.calls == []
    assert public.part.state() == {}


def test_figures_of_a_run_with_private_clients(tmp_path):
    kept, one, setup, summary = Kept(tmp_path), record(), record(-1), Summary(nn.Identity())
    kept.part.round_end(one)
    kept.part.round_end(setup)
    assert one.entries == {"epsilon": (About.RUN, 1.0)}
    assert setup.entries == {}
    kept.part.finish(summary)
    assert summary.metrics == {"epsilon": 2.0, "delta": 1e-5}
    assert summary.entries == {"privacy": {"epsilon": 2.0, "delta": 1e-5, "clip": 1.0}}
    nothing = Summary(nn.Identity())
    Kept(tmp_path, said=None, private=False).part.finish(nothing)
    assert (nothing.metrics, nothing.entries) == ({}, {})


def test_a_run_that_goes_on_for_more_rounds_says_what_that_costs(tmp_path):
    state = stored(Kept(tmp_path).part.state())
    for rounds, warned in ((3, False), (4, True)):
        again = Kept(tmp_path, rounds=rounds)
        again.part.restore(state)
        again.part.begin(resumed=True)
        assert [*again.context.warnings] == (["larger-epsilon"] if warned else [])
    assert (
        "planned for 3 rounds with epsilon 1.5: its 4 rounds have epsilon 2."
        in again.context.warnings["larger-epsilon"]
    )
