"""``--profile``: the traced round, and the contents of the trace."""

import gzip
import json

import pytest

from fedkern.engine.parts import trace
from fedkern.engine.parts.trace import Trace
from fedkern.engine.run import run
from fedkern.errors import UserError
from python_tests.interrupted import outcome
from python_tests.stand_ins import record, run_objects


@pytest.fixture
def profiles(monkeypatch):
    """Return the profilers that a part of traces makes."""
    made = []

    class Profile:
        def __init__(self, activities):
            self.calls = []
            made.append(self)

        def start(self):
            self.calls.append("start")

        def stop(self):
            self.calls.append("stop")

        def export_chrome_trace(self, path):
            with open(path, "w") as file:  # noqa: PTH123
                file.write(f"trace {len(made)}")

    monkeypatch.setattr(trace, "profile", Profile)
    return made


@pytest.mark.parametrize(("rounds", "traced"), [(4, 2), (1, 1)])
def test_the_second_round_is_traced_or_the_only_one(rounds, traced, profiles, tmp_path):
    part = Trace(run_objects(out=tmp_path))
    for number in (-1, *range(1, rounds + 1)):
        noted = record(number, rounds)
        part.before_round(noted)
        assert noted.in_server_process is (number == traced)  # an operator of another process would be missing
        part.round_end(noted)
        assert trace.TRACE in [path.name for path in tmp_path.iterdir()] or number < traced
    part.close()
    assert [profile.calls for profile in profiles] == [["start", "stop"]]
    assert gzip.decompress((tmp_path / trace.TRACE).read_bytes()) == b"trace 1"


def test_a_trace_ends_with_a_run_that_fails(profiles, tmp_path):
    part = Trace(run_objects(out=tmp_path))
    part.before_round(record(1, 1))
    part.close()
    part.close()
    assert [profile.calls for profile in profiles] == [["start", "stop"]]
    assert [*tmp_path.iterdir()] == []


def test_a_trace_of_one_round(make_config, make_data, tmp_path):
    config, data = make_config(rounds=2), make_data()
    run(config, out=tmp_path / "plain", data=data)
    run(config, out=tmp_path / "run", data=data, profile=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "plain")
    with gzip.open(tmp_path / "run" / "profile.json.gz") as file:
        events = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    steps = sum(name == "aten::nll_loss_backward" for name in events)
    batches = sum(-(-len(split.labels) // config.batch_size) for split in data.clients)
    assert 0 < steps <= config.local_epochs * batches
    assert not (tmp_path / "plain" / "profile.json.gz").exists()


def test_private_records_have_no_trace(make_config, make_data, tmp_path):
    """A trace would show a client's number of steps."""
    with pytest.raises(UserError, match="--profile writes what every client computed"):
        run(make_config(rounds=1, records="private"), out=tmp_path / "run", data=make_data(), profile=True)
    assert not any((tmp_path / "run").glob("*"))
