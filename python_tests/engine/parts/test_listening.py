"""The part that tells listeners of rounds."""

from types import SimpleNamespace

from fedkern.engine.parts.listening import Listening
from fedkern.listeners.listener_group import ListenerGroup
from fedkern.methods.base import Round
from fedkern.privacy.disclosure import About
from python_tests.engine.parts.hearing import Hearing
from python_tests.stand_ins import record, stored


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
