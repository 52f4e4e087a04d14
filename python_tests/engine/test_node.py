"""Clients and servers in other processes: pickled states, missing answers, messages of an exchange, plugins."""

import json
from decimal import Decimal
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch

from fedkern.engine import hooks
from fedkern.engine.client import Client
from fedkern.engine.context import TAKEN, RunContext
from fedkern.engine.executors.executor import Answer
from fedkern.engine.executors.serial import Serial
from fedkern.engine.run import run
from fedkern.engine.server import Server
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.messages.packets import Packer, Unpacker
from fedkern.methods import METHODS
from fedkern.methods.base import Phase
from fedkern.privacy.guarantee import Disclosure
from fedkern.settings.config import RunConfig
from fedkern.usercode import plugins
from python_tests.interrupted import outcome
from python_tests.plugin_sources import EXAMPLES, Marked, no_plugins, unload_all  # noqa: F401


def send(value):
    """Return the value as another process receives it."""
    return Unpacker().unpack(Packer().pack(value))


@pytest.fixture
def context(make_data, make_config):
    return RunContext(make_config(), make_data(), lambda text: pytest.fail("the run's own display was told"))


def test_what_was_kept_works_in_the_other_process(context):
    server, client = Server(context), Client(context, 1, {})
    node, notice, build, network = send((context, server.notice, server.build, client.network))
    heard = []
    node.notices.on_notice = heard.append
    notice("hello")
    assert heard == ["hello"]
    expected = {name: value.tolist() for name, value in server.build().state_dict().items()}
    for made in (build(), network()):
        assert {name: value.tolist() for name, value in made.state_dict().items()} == expected


@pytest.mark.parametrize(("disclosure", "told"), [
    (Disclosure(), {"of-server": "text", "of-client": "text"}),
    (Disclosure(clients=False), {"of-server": "text"}),
    (Disclosure(clients=False, server=False), {}),
])  # fmt: skip
def test_warnings_that_may_be_told(context, disclosure, told):
    context.notices.disclosure = disclosure
    node, server, client = send((context, Server(context).warn, Client(context, 1, {}).warn))
    server("of-server", "text")
    client("of-client", "text")
    assert node.notices.warnings == told
    assert not context.notices.warnings


@pytest.mark.parametrize("name", ["state", "report", "round_cache"])
def test_what_would_be_lost_is_not_there(context, name):
    """A worker's changes would not reach the run's client or server."""
    _, *nodes = send((context, Server(context, {"kept": 1}), Client(context, 1, {"kept": 1})))
    for node in nodes:
        with pytest.raises(AttributeError, match=name):
            getattr(node, name)


class Reporting:
    """A method whose clients report something given."""

    def __init__(self, report):
        self.report = report

    def client_update(self, client, phase, message):
        client.report.update(self.report)
        return message


def ask(context, report):
    """Return the answer of a client with this report."""
    serial = Serial(context, {"method": Reporting(report)}, lambda k: dict, 1)
    return serial.ask(1, "method", Phase(0, "train", "update"), {})


NUMBERS = {
    **{kind.__name__: (kind(0.5), 0.5) for kind in (float, np.float16, np.float32, np.longdouble, Fraction, Decimal)},
    **{kind.__name__: (kind(3), 3) for kind in (int, np.int8, np.uint64)},
    "bool": (True, True),
    "tensor": (torch.tensor(0.5), 0.5),
    "tensor of one": (torch.tensor([0.5], dtype=torch.bfloat16), 0.5),
}
NO_NUMBERS = {
    "text": "0.5", "none": None, "list": [0.5], "dict": {"a": 1}, "array": np.zeros(3), "tensor": torch.zeros(3),
    "complex": 1j, "complex64": np.complex64(1), "too large": Fraction(10) ** 400,
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_reported_numbers_become_pythons(context, name):
    value, plain = NUMBERS[name]
    answer = ask(context, {"extra": value})
    assert answer.problem is None
    assert answer.report == {"extra": plain}
    assert json.loads(json.dumps(answer.report)) == {"extra": plain}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_a_report_that_is_no_number_fails_its_client(context, name):
    answer = ask(context, {"fine": 1.0, "extra": NO_NUMBERS[name]})
    assert (answer.message, answer.report) == (None, {})
    assert str(answer.problem.at("in round 1", "1 (b)")).startswith(
        'Client 1 (b) failed in round 1: client.report["extra"] must be a number'
    )
    assert str(answer.problem).endswith(": report a number, or leave it out.")
    assert answer.problem.exit_code == UserError.exit_code


@pytest.mark.parametrize("name", TAKEN)
def test_a_report_has_no_name_of_the_engines(context, name):
    answer = ask(context, {name: 5})
    assert f'client.report["{name}"] has a name of the engine\'s' in str(answer.problem)
    assert all(taken in str(answer.problem) for taken in TAKEN)


# -- hooks -------------------------------------------------------------------------------------------------------------


class Counted(dict):
    looks = 0

    def __iter__(self):
        self.looks += 1
        return super().__iter__()


def test_messages_of_all_clients_are_looked_through_once():
    outgoing = Counted({k: {"n": k} for k in range(100)})
    found = hooks.messages_for(outgoing, range(0, 100, 2))
    assert found == {k: {"n": k} for k in range(0, 100, 2)}
    assert outgoing.looks == 1
    assert hooks.messages_for({"x": 1}, [3, 4]) == {3: {"x": 1}, 4: {"x": 1}}
    assert hooks.messages_for(None, [3], may_skip_clients=True) == {3: None}
    assert hooks.message_for(outgoing, 7) == {"n": 7}
    assert hooks.messages_for({1: {}}, [1, 3], may_skip_clients=True) == {1: {}, 3: None}
    with pytest.raises(ValueError, match="a message for client 3"):
        hooks.messages_for({1: {}}, [1, 3])


# -- remote clients ----------------------------------------------------------------------------------------------------


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


# -- plugin workers ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_plugins")
@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "file"), [("fedavgm", "fedavgm.py"), ("smoothed", "smoothed_labels.py")])
def test_the_examples_have_the_same_bits(method, file, make_data, tmp_path):
    settings = {"width": 2, "rounds": 3, "local_epochs": 1, "batch_size": 4, "clients": 3, "threads": 1, "grad_cam": 0}
    config = RunConfig.make(method, plugins=[str(EXAMPLES / file)], **settings)
    for workers in ("1", "2", "3"):
        run(config.replace(workers=workers), out=tmp_path / workers, data=make_data())
    serial = outcome(tmp_path / "1")
    assert "no-workers" not in serial[2]["diagnostics"]
    assert outcome(tmp_path / "2") == serial
    assert outcome(tmp_path / "3") == serial


@pytest.mark.usefixtures("no_plugins")
def test_another_process_gets_the_content_that_this_one_has_executed(tmp_path):
    marked = Marked(tmp_path)
    stored = plugins.load_given([str(marked.path)])
    sent = plugins.sent_plugins(stored)
    marked.path.unlink()
    name = METHODS["mine"].__module__
    unload_all()
    plugins.receive(sent)
    assert METHODS["mine"].__module__ == name  # what a pickle of the method refers to
    plugins.receive(sent)
    assert marked.runs == 2
    assert plugins.sent_plugins({}) == []
