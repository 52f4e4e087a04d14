"""Check of work that must be refused at once, where it might wait for a pipe or follow a loop for ever."""

import threading
from collections.abc import Callable
from typing import Any

from fedkern.errors import UserError


def in_time(work: Callable[[], Any], seconds: float = 20) -> str:
    """Return the sentence that ``work`` raises.

    A thread that waits for a pipe's writer is released at the end.
    """
    ends: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            ends.append(None)
        except BaseException as error:
            ends.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert ends, "it waits for a pipe"
    assert isinstance(ends[0], UserError), ends[0]
    return str(ends[0])
