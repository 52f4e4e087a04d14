"""Worker processes that are up before the first client works: without them a short run has no workers at all."""

import select
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def waiting_for_workers() -> Iterator[None]:
    """Make runs inside the block wait for the workers that they start.

    Every test of pytest's process is inside.
    """
    from fedkern.engine.executors.fork_server import ForkServer

    is_ready = ForkServer.ready

    def wait(self: ForkServer) -> bool:
        while not is_ready(self):
            select.select([self.channel], [], [])
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForkServer, "ready", wait)
        yield
