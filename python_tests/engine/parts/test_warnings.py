"""The part that reports warnings."""

from torch import nn

from fedkern.engine.parts.part import Summary
from fedkern.engine.parts.warnings import Warnings
from fedkern.listeners.events import Listeners
from fedkern.listeners.listener_group import ListenerGroup
from python_tests.engine.parts.hearing import Hearing
from python_tests.stand_ins import Context, record, round_trip, run_objects


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
