"""The mod that sends a ClientApp's traceback to the server."""

import re
from pathlib import Path

import pytest

from fedkern.flower.client_tracebacks import ClientAppFailed, with_traceback

PAGE = Path(__file__).resolve().parents[2] / "docs/flower-deployment.md"


def test_an_exception_has_its_traceback_as_message():
    def broken(message, context):
        raise KeyError(message)

    with pytest.raises(ClientAppFailed, match=r"(?s)^Traceback .*in broken\n.*KeyError: 'images'") as raised:
        with_traceback("images", None, broken)
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_reply_passes():
    assert with_traceback("message", "context", lambda *given: given) == ("message", "context")


@pytest.mark.flower
def test_the_pages_code_runs():
    pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(block, PAGE.name, "exec"), {})
