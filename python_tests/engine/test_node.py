"""Clients and servers that a method has kept, pickled for worker processes, and the reports of clients."""

import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.executors.serial import Serial
from fedkern.engine.node import TAKEN
from fedkern.engine.server import Server
from fedkern.errors import UserError
from fedkern.messages.packets import Packer, Unpacker
from fedkern.methods.base import Phase
from fedkern.privacy.disclosure import Disclosure


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
