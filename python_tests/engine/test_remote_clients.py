"""Runs whose clients work elsewhere: what the engine makes of answers that do not come, or cannot be read."""

from typing import ClassVar

import pytest

from fedkern.engine.executors.base import Answer
from fedkern.engine.executors.serial import Serial
from fedkern.engine.run import run
from fedkern.engine.store.records import read_metrics
from fedkern.errors import UserError
from fedkern.settings.run_data import declared_data
from python_tests.interrupted import outcome


class RemoteClients(Serial):
    """The clients of this process, as if they were in another; ``faults`` are fields of answers by round and client."""

    remote = True
    faults: ClassVar[dict] = {}

    def answers(self, asker, phase, messages, encoders=None):
        for answer in super().answers(asker, phase, messages, encoders):
            fault = self.faults.get((phase.round, answer.client))
            yield answer if fault is None else Answer(answer.client, **fault)


def remote(**faults):
    kind = type(
        "Faulty", (RemoteClients,), {"faults": {tuple(map(int, at[1:].split("_"))): f for at, f in faults.items()}}
    )

    def made(side):
        return kind(side.context, side.here._handlers, side.checkpoints.reader, side.context.config.client_threads)

    return made


def test_the_bits_are_those_of_clients_here(make_data, make_config, tmp_path):
    config = make_config("scaffold", rounds=2)
    run(config, out=tmp_path / "here", data=make_data())
    run(config, out=tmp_path / "there", data=make_data(), remote=remote())
    assert outcome(tmp_path / "there") == outcome(tmp_path / "here")


def test_who_does_not_answer_is_left_out_and_named(make_data, make_config, tmp_path):
    faults = {
        "r1_0": {"absent": "it had not answered after 5 seconds"},
        "r0_1": {"refused": "has a text that is no JSON"},
    }
    run(make_config("scaffold", rounds=3, on_nan="skip"), out=tmp_path, data=make_data(), remote=remote(**faults))
    found = [record.get("dropped", []) for record in read_metrics(tmp_path)]
    assert [[(entry["client"], entry["reason"]) for entry in round] for round in found] == [
        [(1, "has a text that is no JSON")], [(0, "it had not answered after 5 seconds")], [],
    ]  # fmt: skip
    told = outcome(tmp_path)[2]["diagnostics"]
    assert told["missing-client-0"] == "Client 0 was left out in round 2, as it had not answered after 5 seconds."
    assert told["refused-upload-1"].startswith("Client 1's upload in round 1 has a text that is no JSON")


def test_an_answer_that_cannot_be_read_stops_the_run_unless_told_otherwise(make_data, make_config, tmp_path):
    fault = {"r0_1": {"refused": "has a text that is no JSON"}}
    with pytest.raises(UserError, match="has a text that is no JSON; leave such uploads out with --on-nan skip"):
        run(make_config("scaffold"), out=tmp_path, data=make_data(), remote=remote(**fault))


def test_nothing_is_told_of_who_is_missing_where_nothing_may_be_told(make_data, make_config, tmp_path):
    pytest.importorskip("dp_accounting")
    private = {"rounds": 2, "on_nan": "skip", "records": "private", "dp_clip": 1.0, "dp_noise": 1.0}
    config = make_config("fedavg", **private)
    faults = {"r1_0": {"absent": "it had not answered after 5 seconds"}, "r0_1": {"refused": "has a text"}}
    run(config, out=tmp_path / "all", data=make_data(), remote=remote())
    run(config, out=tmp_path / "some", data=make_data(), remote=remote(**faults))
    found = [outcome(tmp_path / name)[2] for name in ("all", "some")]
    assert not any(name.startswith(("missing", "refused")) for name in found[1]["diagnostics"])
    assert found[0]["bytes"] == found[1]["bytes"]
    assert not any("dropped" in record for record in read_metrics(tmp_path / "some"))


def test_nobody_answers(make_data, make_config, tmp_path):
    faults = {f"r0_{k}": {"absent": "no node of it is connected"} for k in range(len(make_data().clients))}
    with pytest.raises(UserError, match="No client is left in round 1"):
        run(make_config("fedavg"), out=tmp_path, data=make_data(), remote=remote(**faults))


def test_data_of_which_only_the_sizes_are_known(make_data):
    data = make_data()
    found = declared_data(data, [5, 7])
    assert found.client_sizes == (5, 7)
    assert found.task == data.task
    assert list(found.statistics.sizes) == [5, 7]
    assert sum(split.images.numel() for split in found.clients) < 100
