"""The mod that sends a ClientApp's traceback to the server."""

import pytest

from fedkern.flower.client_tracebacks import ClientAppFailed, with_traceback


def test_an_exception_has_its_traceback_as_message():
    def broken(message, context):
        raise KeyError(message)

    with pytest.raises(ClientAppFailed, match=r"(?s)^Traceback .*in broken\n.*KeyError: 'images'") as raised:
        with_traceback("images", None, broken)
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_reply_passes():
    assert with_traceback("message", "context", lambda *given: given) == ("message", "context")
