"""Parts that report: warnings, listeners, diagnoses of clients, and parts that override nothing."""

import math

import pytest
from torch import nn

from fedkern.engine.parts.diagnoses import Diagnoses
from fedkern.engine.parts.listening import Listening
from fedkern.engine.parts.part import Part, Summary
from fedkern.engine.parts.warnings import Warnings
from fedkern.listeners.events import Listeners
from fedkern.listeners.listener_group import ListenerGroup
from fedkern.methods.base import Round
from fedkern.privacy.guarantee import About, Disclosure
from python_tests.engine.parts.hearing import Hearing
from python_tests.engine.parts.judged import SETTINGS, Judged, code
from python_tests.stand_ins import Context, Executor, record, round_trip, run_objects


def test_every_warning_is_told_once():
    context, heard = Context(), Hearing()
    part = Warnings(run_objects(context, listener=ListenerGroup(heard)))
    context.notices.warn("setup", "It is slow.")
    part.round_end(record(-1))
    assert heard.events == []  # with the first communication round
    part.round_end(record(1))
    context.notices.warn("setup", "It is still slow.")
    part.round_end(record(2))
    state = round_trip(part.state())
    context.notices.warn("late", "It is late.")
    summary = Summary(nn.Identity())
    part.finish(summary)
    assert heard.events == [("warning", "setup", "It is slow."), ("warning", "late", "It is late.")]
    assert summary.entries == {"diagnostics": {"setup": "It is slow.", "late": "It is late."}}
    resumed, again = Context(), Hearing()
    part = Warnings(run_objects(resumed, listener=ListenerGroup(again)))
    part.restore(state)
    part.round_end(record(3))
    assert again.events == []
    assert resumed.notices.warnings == {"setup": "It is slow."}


def test_a_resumed_run_tells_what_is_new():
    context, heard = Context(), Hearing()
    context.notices.warn("same", "It is slow.")
    context.notices.warn("other", "It has changed. It has changed again.")
    part = Warnings(run_objects(context, listener=ListenerGroup(heard)))
    part.restore({"early": "It was early.", "same": "It is slow.", "other": "It has changed."})
    part.round_end(record(3))
    assert heard.events == [("warning", "other", "It has changed. It has changed again.")]
    assert [*context.notices.warnings] == ["early", "same", "other"]


def test_warnings_about_listeners_stand_beside_the_others():
    context, broken, intact = Context(), Hearing("round"), Hearing()
    listeners = ListenerGroup(Listeners(broken, intact))
    listeners.on_round({"round": 1})
    part = Warnings(run_objects(context, listener=listeners))
    part.round_end(record())
    assert [*context.notices.warnings] == ["listener-Hearing"]
    assert [event[0] for event in intact.events] == ["warning", "round"]  # told at once, and not again


# -- listening ---------------------------------------------------------------------------------------------------------


def test_listeners_hear_of_rounds_what_may_be_told():
    heard, context, setup = Hearing(), Context(2), record(-1, entry=Round("setup", one_off=True, trains="generator"))
    context.networks.model_name, noted = "cnn", record(1, entry=Round("train", trains="network"))
    part = Listening(run_objects(
        context, listener=ListenerGroup(heard), network=nn.Linear(2, 1), parameters=3, plan=[setup.entry, noted.entry],
        sets={"id_": [0, 0]}, guarantee=None, executor=Executor(),
    ))  # fmt: skip
    part.begin(resumed=False)
    noted.put({"secret": 1.0}, About.CLIENTS)
    noted.public = {"round": 1}
    for entry in (setup, noted):
        part.before_round(entry)
        part.round_end(entry)
    (_, info), *events = heard.events
    told = info.samples, info.parameters, info.frozen, info.rounds, info.test_sets, info.workers, info.worker_bytes
    assert told == ([10, 20], 3, 0, (noted.entry,), {"id": 2}, 1, 0)
    assert (info.config, info.data, info.model, info.private) == (context.config, context.data, "cnn", False)
    assert events == [
        ("round start", -1, "setup", [0, 1]), ("notice", "set-up: generator"),
        ("round start", 1, "train", [0, 1]), ("round", {"round": 1}),
    ]  # fmt: skip


def test_listeners_go_on_from_a_checkpoint():
    heard, again = Hearing(), Hearing()
    heard.kept = {"id": "a1"}
    parts = [Listening(run_objects(listener=ListenerGroup(listener))) for listener in (heard, again)]
    parts[1].restore(round_trip(parts[0].state()))
    assert again.kept == {"id": "a1"}


# -- diagnoses ---------------------------------------------------------------------------------------------------------


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


# -- base --------------------------------------------------------------------------------------------------------------


def test_a_part_that_overrides_nothing_does_nothing():
    part, noted, summary = Part(), record(), Summary(nn.Identity())
    part.begin(resumed=False)
    assert part.before_round(noted) is None
    assert part.round_end(noted) is None
    part.finish(summary)
    part.restore({})
    part.close()
    assert part.state() == {}
    assert (noted.entries, summary.entries, summary.metrics) == ({}, {}, {})
