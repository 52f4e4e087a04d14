"""The part that counts bytes."""

from types import SimpleNamespace

import pytest
from torch import nn

from fedkern.engine.parts.part import Summary
from fedkern.engine.parts.traffic import Traffic
from fedkern.engine.rounds.ledger import Ledger
from fedkern.methods.base import Phase, Round
from fedkern.privacy.disclosure import About
from python_tests.stand_ins import Context, about, record, round_trip, run_objects, values

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
