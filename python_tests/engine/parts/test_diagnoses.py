"""The part that diagnoses what clients reported."""

import math

import pytest
from torch import nn

from fedkern.engine.parts.diagnoses import Diagnoses
from fedkern.engine.parts.part import Summary
from fedkern.privacy.disclosure import Disclosure
from python_tests.engine.parts.judged import SETTINGS, Judged, code
from python_tests.stand_ins import Context, record, round_trip, run_objects


def diagnoses(*, clients=True):
    method, context = Judged(), Context(disclosure=Disclosure(clients=clients), **SETTINGS)
    context.notices.warn("known", "It was known before.")
    return method, context, Diagnoses(run_objects(context, method=method, code=code(method), sets={}))


def report_rounds(part):
    """Report a set-up round and two communication rounds, the last round with one client far from the others."""
    part.round_end(record(-1, reports=[{"loss": 8.0, "samples": 3}], clients={"0": {"drift": 100.0}}))
    part.round_end(record(1, reports=[{"loss": 1.0}, {"loss": math.nan}]))
    drifts = {str(k): {"drift": drift} for k, drift in enumerate((1.0, 1.0, 90.0))}
    part.round_end(record(2, reports=[{"loss": 3.0}], clients=drifts))


@pytest.mark.parametrize("resumed", [False, True])
def test_diagnoses_of_what_clients_reported(resumed):
    method, context, part = diagnoses()
    report_rounds(part)
    if resumed:
        state = round_trip(part.state())
        method, context, part = diagnoses()
        part.restore(state)
    part.round_end(record(-4, clients={str(k): {"drift": 1.0} for k in range(3)}))  # says nothing of the last round
    part.finish(Summary(nn.Identity(), metrics={"accuracy": 0.5}))
    loss = method.observed["loss"]
    assert (loss.count, loss.mean, loss.low, loss.high) == (3, 4.0, 1.0, 8.0)
    assert [*context.notices.warnings] == ["known", "outlying-client", "chance-level", "odd"]
    assert "client 2 is 90 times" in context.notices.warnings["outlying-client"]
    assert context.notices.warnings["known"] == "It was known before."
    # A run that is made longer drops what was said of the network that is not the final one any more.
    assert part.state()["final"] == ["outlying-client", "chance-level", "odd"]


def test_diagnoses_of_private_clients_are_left_out():
    method, context, part = diagnoses(clients=False)
    report_rounds(part)
    part.finish(Summary(nn.Identity(), metrics={"accuracy": 0.5}))
    assert method.observed is None
    assert [*context.notices.warnings] == ["known", "chance-level"]
