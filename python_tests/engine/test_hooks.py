"""Messages of an exchange, by client."""

import pytest

from fedkern.engine import hooks


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
