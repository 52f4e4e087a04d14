"""Clients and servers that a method has kept, in the packets that worker processes get."""

import pytest

from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.server import Server
from fedkern.messages.packets import Packer, Unpacker
from fedkern.privacy.disclosure import Disclosure


def sent(value):
    """The value as another process gets it."""
    return Unpacker().unpack(Packer().pack(value))


@pytest.fixture
def context(make_data, make_config):
    return RunContext(make_config(), make_data(), lambda text: pytest.fail("the run's own display was told"))


def test_what_was_kept_works_in_the_other_process(context):
    server, client = Server(context), Client(context, 1, {})
    there, notice, build, network = sent((context, server.notice, server.build, client.network))
    heard = []
    there.on_notice = heard.append
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
    context.disclosure = disclosure
    there, server, client = sent((context, Server(context).warn, Client(context, 1, {}).warn))
    server("of-server", "text")
    client("of-client", "text")
    assert there.warnings == told
    assert not context.warnings


@pytest.mark.parametrize("name", ["state", "report", "round_cache"])
def test_what_would_be_lost_is_not_there(context, name):
    """A worker's changes would not come back to the client or the server of the run."""
    _, *nodes = sent((context, Server(context, {"kept": 1}), Client(context, 1, {"kept": 1})))
    for node in nodes:
        with pytest.raises(AttributeError, match=name):
            getattr(node, name)
