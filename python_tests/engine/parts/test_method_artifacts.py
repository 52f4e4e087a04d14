"""The part that keeps what the method logs."""

from types import SimpleNamespace

import pytest
import torch

from fedkern.engine.parts.method_artifacts import Artifacts
from fedkern.engine.rounds.progress import Progress
from fedkern.engine.store.artifacts import FILE
from fedkern.errors import UserError
from fedkern.privacy.disclosure import Disclosure
from python_tests.stand_ins import Context, record, round_trip, run_objects


def showing(out, told=True, done=0):
    server = SimpleNamespace(showing=None, artifacts={})
    context = Context(disclosure=Disclosure(server=told))
    return server, Artifacts(run_objects(context, out=out, server=server, rounds=16, progress=Progress(done=done)))


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
            state = round_trip(part.state())
    assert part.state() != state  # and writes the file with both
    _, again = showing(tmp_path, done=1)
    again.restore(state)
    assert again.state() == state
    _, resumed = showing(tmp_path, done=2)
    with pytest.raises(UserError, match=f"{FILE} is not what the run wrote"):
        resumed.restore(state)
