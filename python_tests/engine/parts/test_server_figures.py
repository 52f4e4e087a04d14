"""Parts of figures: those of the server, of an experimenter, of traffic and of privacy."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedkern.engine.parts.oracle import Oracle
from fedkern.engine.parts.part import Summary
from fedkern.engine.parts.privacy import Privacy
from fedkern.engine.parts.server_figures import ServerFigures
from fedkern.engine.parts.traffic import Traffic
from fedkern.engine.rounds.ledger import Ledger
from fedkern.engine.rounds.progress import Progress
from fedkern.errors import UserError
from fedkern.methods.base import Phase, Round
from fedkern.privacy import Guarantee, server_secret
from fedkern.privacy.guarantee import About, Disclosure
from python_tests.engine.parts.judged import Judged, code
from python_tests.stand_ins import PRIVATE, Context, about, record, round_trip, run_objects, values


def figures_of(server, disclosure=None):
    return ServerFigures(run_objects(Context(disclosure=disclosure), server=server))


@pytest.mark.parametrize("told", [False, True])
def test_figures_that_the_server_reports(told):
    server, disclosure = SimpleNamespace(report={}), Disclosure(False, told)
    part, setup, noted = figures_of(server, disclosure), record(-1), record()
    part.restore({"norm": 1, "spread": None})
    part.round_end(setup)
    part.round_end(noted)
    assert setup.entries == {}
    assert about(noted, About.SERVER) == {"norm", "spread"}
    assert server.report["norm"] == 1.0
    assert type(server.report["norm"]) is float
    assert server.report["spread"] != server.report["spread"]  # NaN, which a resumed run gets as None
    summary = Summary(nn.Identity())
    part.finish(summary)
    assert summary.metrics.keys() == ({"norm", "spread"} if told else set())


def test_the_servers_figures_go_on_from_a_checkpoint():
    part, again = (figures_of(SimpleNamespace(report=report)) for report in ({"norm": 1.0}, {}))
    again.restore(round_trip(part.state()))
    assert again.state() == {"norm": 1.0}


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), np.float64(0.5)])
def test_numbers_that_the_server_reports_become_pythons(value):
    server, noted = SimpleNamespace(report={"x": value}), record()
    figures_of(server).round_end(noted)
    assert type(server.report["x"]) is float
    assert values(noted) == {"x": 0.5}


@pytest.mark.parametrize("value", [None, "0.5", [0.5], np.zeros(2), 1j])
def test_what_the_server_reports_must_be_numbers(value):
    server, noted = SimpleNamespace(report={"x": value}), record()
    with pytest.raises(UserError, match=r'server.report\["x"\] must be a number, not .*: report a number, or leave'):
        figures_of(server).round_end(noted)
    assert noted.entries == {}


@pytest.mark.parametrize("name", ["accuracy", "round", "seconds"])
def test_the_server_may_report_no_name_of_the_engines(name):
    noted = record()
    noted.put({"accuracy": 0.5})
    part = figures_of(SimpleNamespace(report={name: 1.0}))
    with pytest.raises(UserError, match=rf'server.report\["{name}"\] has a name of the engine\'s: choose one besides'):
        part.round_end(noted)


# -- oracle ------------------------------------------------------------------------------------------------------------


def oracle(method, context, **given):
    return Oracle(run_objects(context, method=method, code=code(method), **given))


@pytest.mark.parametrize(
    ("disclosure", "told"),
    [
        (Disclosure(), {"paid": 2.0, "id_paid": 2.0, "unpaid": 4.0}),
        (Disclosure(clients=False, derived_figures=("paid",)), {"paid": 2.0, "id_paid": 2.0}),
        (PRIVATE, {}),
    ],
)
def test_figures_that_only_an_experimenter_can_have(disclosure, told, monkeypatch):
    method, summary = Judged(), Summary(nn.Identity(), metrics={"accuracy": 0.5})
    if not told:
        monkeypatch.setattr(method, "oracle_metrics", None)  # nobody computes what nobody may know
    part = oracle(method, Context(3, disclosure), server=1.0, sets={"id_": None})
    part.finish(summary)
    assert summary.metrics == {"accuracy": 0.5, **told}


def test_an_experimenters_figures_are_numbers(monkeypatch):
    method, summary = Judged(), Summary(nn.Identity())
    part = oracle(method, Context(), server=None, sets={})
    monkeypatch.setattr(method, "oracle_metrics", lambda *_: {"half": np.float32(0.5), "two": torch.tensor(2)})
    part.finish(summary)
    assert json.dumps(summary.metrics) == '{"half": 0.5, "two": 2.0}'
    monkeypatch.setattr(method, "oracle_metrics", lambda *_: {"both": [0.5, 1.0]})
    with pytest.raises(UserError, match=r'oracle_metrics\["both"\] must be a number, not list: report a number'):
        part.finish(summary)


# -- traffic -----------------------------------------------------------------------------------------------------------


TRAIN = Phase(0, "train", "update")


class Booked:
    """The part of traffic of two clients, with stand-ins for its run."""

    def __init__(self, *, rows=None, wire=None, secret=False, shared_words=False):
        self.ledger, self.context, self.server = Ledger(2), Context(2), SimpleNamespace(traffic=None)
        self.context.words = lambda: ([{"words": ["red"]}, {"words": ["blue"]}], {"words": ["red", "blue"]})
        checkpoints = SimpleNamespace(ledger_rows=lambda: rows)
        self.ledger.wire = {} if wire is None else wire
        plan = [Round(counted=("update",) if shared_words else ())]
        self.part = Traffic(run_objects(
            self.context, ledger=self.ledger, server=self.server, checkpoints=checkpoints, plan=plan,
            samples_in_secret=secret,
        ))  # fmt: skip


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
    noted = record(1, exchanges=("update", "statistics", "nothing"))
    booked.ledger.book(0, "up", [0] * 9, phase=TRAIN)
    booked.part.before_round(noted)
    booked.ledger.book(0, "up", [0] * 2, phase=TRAIN)
    booked.ledger.book(1, "down", [0], phase=Phase(0, "train", "statistics"))
    booked.part.round_end(noted)
    assert values(noted) == {
        "bytes_up": 88, "bytes_down": 8, "round_bytes_up": 16, "round_bytes_down": 8,
        "bytes": {
            "train/update": {"up": 16, "down": 0}, "train/statistics": {"up": 0, "down": 8},
            "train/nothing": {"up": 0, "down": 0},
        },
    }  # fmt: skip
    assert len(about(noted, About.RUN)) == 5
    single, setup = record(2, exchanges=("update",)), record(-1)
    for entry in (single, setup):
        booked.part.before_round(entry)
        booked.part.round_end(entry)
    assert single.entries.keys() == noted.entries.keys() - {"bytes"}
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


def test_bytes_go_on_from_a_checkpoint():
    booked = Booked(wire={"up": 100})
    booked.ledger.book(1, "up", [0], phase=TRAIN)
    state, wire = round_trip(booked.part.state()), {}
    again = Booked(rows={1: (8, 0, 0, 0)}, wire=wire)
    again.part.restore(state)
    assert again.ledger.summary() == booked.ledger.summary()
    assert wire == {"up": 100}


# -- privacy -----------------------------------------------------------------------------------------------------------


GUARANTEE = Guarantee(1e-5, {"networks": "the networks"})


class Kept:
    """The part of privacy with stand-ins for its run."""

    def __init__(self, out, *, said=GUARANTEE, private=True, rounds=3, draws="seed"):
        self.calls, self.context = [], Context(dp_draws=draws, trained_clients=2)
        report = {"epsilon": 2.0, "delta": 1e-5, "clip": 1.0}
        self.private = SimpleNamespace(
            planned=rounds / 2,
            secret="",
            figures_after=lambda rounds: {"epsilon": rounds / 2},
            report=lambda rounds: report,
        )
        self.private.keep = lambda secret: setattr(self.private, "secret", secret)
        checkpoints = SimpleNamespace(
            folder=out, write_at_once=lambda: self.calls.append("at once"), client_state=lambda k: {}
        )
        releases = None if said is None else SimpleNamespace(open=lambda plan: self.calls.append(f"open {plan}"))
        self.part = Privacy(run_objects(
            self.context, guarantee=said, private=self.private if private else None, releases=releases,
            checkpoints=checkpoints, progress=Progress(done=2, planned=4), rounds=rounds,
        ))  # fmt: skip


@pytest.mark.parametrize("draws", ["seed", "secret"])
def test_what_a_private_run_needs_before_it_releases_anything(draws, tmp_path):
    kept = Kept(tmp_path, draws=draws)
    kept.part.begin(resumed=False)
    assert kept.calls == ["open 4", "at once"]
    assert kept.private.secret == (server_secret.read_secret(tmp_path) if draws == "secret" else "")
    again = Kept(tmp_path, draws=draws)
    again.part.begin(resumed=True)
    assert again.private.secret == kept.private.secret
    public = Kept(tmp_path, said=None, private=False)
    public.part.begin(resumed=False)
    assert public.calls == []
    assert public.part.state() == {}


def test_figures_of_a_run_with_private_clients(tmp_path):
    kept, noted, setup, summary = Kept(tmp_path), record(), record(-1), Summary(nn.Identity())
    kept.part.round_end(noted)
    kept.part.round_end(setup)
    assert noted.entries == {"epsilon": (About.RUN, 1.0)}
    assert setup.entries == {}
    kept.part.finish(summary)
    assert summary.metrics == {"epsilon": 2.0, "delta": 1e-5}
    assert summary.entries == {"privacy": {"epsilon": 2.0, "delta": 1e-5, "clip": 1.0}}
    nothing = Summary(nn.Identity())
    Kept(tmp_path, said=None, private=False).part.finish(nothing)
    assert (nothing.metrics, nothing.entries) == ({}, {})


def test_a_run_that_goes_on_for_more_rounds_says_what_that_costs(tmp_path):
    state = round_trip(Kept(tmp_path).part.state())
    for rounds, warned in ((3, False), (4, True)):
        again = Kept(tmp_path, rounds=rounds)
        again.part.restore(state)
        again.part.begin(resumed=True)
        assert [*again.context.notices.warnings] == (["larger-epsilon"] if warned else [])
    assert (
        "planned for 3 rounds with epsilon 1.5: its 4 rounds have epsilon 2."
        in again.context.notices.warnings["larger-epsilon"]
    )
