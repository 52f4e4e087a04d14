"""Remote clients: answers that are missing or cannot be read."""

from typing import ClassVar

from fedkern.engine.executors.executor import Answer
from fedkern.engine.executors.serial import Serial
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from python_tests.interrupted import outcome


class RemoteClients(Serial):
    """The clients of this process, as if they were in another.

    ``faults`` are fields of answers by round and client.
    """

    remote = True
    faults: ClassVar[dict] = {}

    def answers(self, callee, phase, messages, encoders=None):
        for answer in super().answers(callee, phase, messages, encoders):
            fault = self.faults.get((phase.round, answer.client))
            yield answer if fault is None else Answer(answer.client, **fault)


def remote(**faults):
    kind = type(
        "Faulty", (RemoteClients,), {"faults": {tuple(map(int, at[1:].split("_"))): f for at, f in faults.items()}}
    )

    def make_remote(side):
        threads = side.context.config.client_threads
        return kind(side.context, side.here._handlers, side.store.checkpoints.reader, threads)

    return make_remote


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
