"""The part that informs listeners of rounds."""

from torch import nn

from fedkern.engine.parts.listening import Listening
from fedkern.listeners.listener_group import ListenerGroup
from fedkern.methods.base import Round
from fedkern.privacy.disclosure import About
from python_tests.engine.parts.hearing import Hearing
from python_tests.stand_ins import Context, Executor, record, round_trip, run_objects


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
